"""The demo: one real job through the whole product."""
