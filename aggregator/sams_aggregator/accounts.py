# ruff: noqa: S608 - all that is put into the statements is this program's own
"""From facts to accounts: which run each epoch belongs to, and where its core-time went.

Everything is worked out in SQL on integers, in tables of a database in memory:

    run       one row per run: of sacct, or of epochs that sacct does not know
    account   (run, month, class, path, flags): CPU used in ns, core-time in us
    path      the distinct paths, numbered in the order of their bytes

The rules play no part in this, so a change of the rules changes none of it. The result
is kept beside the facts until these change.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

from sams_aggregator import coretime, manifest, nodelist, tables
from sams_aggregator.manifest import Manifest, Store
from sams_aggregator.months import of_zone
from sams_aggregator.tables import SetWriter, integers
from sams_ebpf.errors import SamsError

DERIVED: Final = "derived"
_SEMANTICS: Final = 1  # raise it when the same facts would give other accounts
_KEPT: Final = 3
# A look-up finds its run's row groups by their statistics; of wide rows they are small.
_ORDERED: Final = {"run": "run", "member": "run, epoch", "path": "path_id"}
_WIDE_ROWS: Final = 8192

# Classes of account rows.
PATH: Final = "path"
UNATTRIBUTED: Final = "unattributed"
OUTSIDE: Final = "outside"
NO_CPU: Final = "no CPU"
NO_DATA: Final = "no data"

# How far the clocks of a node and of Slurm's controller may be apart where the time is
# all that tells two runs apart, ns.
CLOCK_SKEW_NS: Final = 300 * 10**9


# The host's fault, not the files'.
_NO_ROOM: Final = ("No space left on device", "Disk quota exceeded", "Out of Memory Error")


class Site(NamedTuple):
    """What the accounts depend on beside the facts."""

    zone: str = "UTC"
    cluster: str | None = None


class Accounts(NamedTuple):
    """Finished accounts: where the Parquet files are."""

    folder: Path

    def path(self, table: str) -> Path:
        """The Parquet file of one of TABLES."""
        return self.folder / f"{table}{tables.SUFFIX}"

    def source(self, table: str) -> str:
        """SQL for its rows."""
        return f"read_parquet({tables.quoted(self.path(table))})"


TABLES: Final = ("run", "account", "path", "member")


def current(store: Store, site: Site) -> Accounts:
    """Accounts of the facts as they are now; worked out if they are not there yet."""
    view = manifest.read(store)
    made = _place(view, site)
    if not _there(made):
        base = made.folder.parent
        base.mkdir(mode=0o750, exist_ok=True)
        _make(view, site, base, made.folder.name)
        _forget(base, made.folder)
    return made


def ready(view: Manifest, site: Site) -> Accounts | None:
    """Accounts of these facts if they have been worked out already."""
    made = _place(view, site)
    return made if _there(made) else None


def damaged(said: str) -> SamsError:
    """What a reader says of files of facts or accounts, with what to do about it."""
    text = " ".join(said.split())[:500]
    if any(reason in text for reason in _NO_ROOM):
        return SamsError(f"facts: {text} (nothing is lost: make room, and do it again)")
    way = (
        f"delete the folder `{DERIVED}`: it is made again from the facts"
        if f"/{DERIVED}/" in text
        else "`reprocess --replace` makes facts again that are damaged or gone"
    )
    return SamsError(f"facts: {text} ({way})")


def _place(view: Manifest, site: Site) -> Accounts:
    key = repr((_SEMANTICS, view.fingerprint, *site)).encode()
    name = blake2b(key, digest_size=12).hexdigest()
    return Accounts(view.folder.parent / DERIVED / name)


def _there(made: Accounts) -> bool:
    return all(made.path(name).exists() for name in TABLES)


def _make(view: Manifest, site: Site, base: Path, key: str) -> None:
    with SetWriter(base, key) as writer:
        connection = tables.connect(memory=tables.MEMORY)
        connection.execute(f"SET temp_directory = {tables.quoted(writer.spill())}")
        build(connection, view, site)
        for name in TABLES:
            order = _ORDERED.get(name)
            tables.copy(
                connection,
                f'SELECT * FROM "{name}"' + (f" ORDER BY {order}" if order else ""),
                writer.path(name),
                row_group=_WIDE_ROWS if name in ("run", "member") else tables.LOOKED_UP_ROWS,
            )
        connection.close()
        writer.finish()


def _forget(base: Path, keep: Path) -> None:
    found = [path for path in base.iterdir() if path.is_dir() and path != keep]
    found.sort(key=lambda path: path.stat().st_mtime)
    for path in found[: max(0, len(found) - _KEPT)]:
        if not path.name.startswith(tables.TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)


def build(connection: Any, view: Manifest, site: Site, *, job_id: int | None = None) -> None:  # noqa: ANN401
    """Make the tables in a connection, for all facts or for those about one job id."""
    steps = _Builder(connection, view, site, job_id)
    steps.load()
    steps.runs()
    steps.resolve()
    steps.members()
    steps.cpu()
    steps.core()
    steps.result()


_ORDER: Final = "row(generation, sequence, tie)"


class _Builder:
    def __init__(self, connection: Any, view: Manifest, site: Site, job_id: int | None) -> None:  # noqa: ANN401
        self._do = connection.execute
        self._connection = connection
        self._view = view
        self._site = site
        self._job_id = job_id

    def load(self) -> None:
        """Tables `claim` (one row per epoch), `head`, `total`, `job`: what counts of the facts."""
        wanted = lost = jobs = ""
        if self._job_id is not None:
            number = int(self._job_id)
            source = self._view.source("claims")
            self._do(
                f"CREATE TEMP TABLE wanted AS SELECT DISTINCT epoch FROM {source}"
                f" WHERE job_id = {number}"
                # A claim by SLUID alone names no job id.
                f" UNION SELECT DISTINCT c.epoch FROM {source} c"
                f" JOIN {self._view.source('jobs')} j ON c.sluid = j.sluid"
                f" WHERE c.job_id IS NULL AND j.job_id = {number}"
            )
            ids = [
                row[0]
                for row in self._do(
                    f"SELECT DISTINCT job_id FROM {source}"
                    " WHERE epoch IN (SELECT epoch FROM wanted) AND job_id IS NOT NULL"
                ).fetchall()
            ]
            numbers = ", ".join(str(int(one)) for one in {*ids, number})
            wanted = f" WHERE (job_id IN ({numbers}) OR job_id IS NULL) AND epoch IN (FROM wanted)"
            lost = " WHERE epoch IN (FROM wanted)"
            jobs = f" WHERE job_id IN ({numbers})"
        claims = ", ".join(f'arg_max("{name}", {_ORDER}) AS "{name}"' for name in tables.CLAIMS)
        source = self._view.source("claims")
        self._do(
            f"CREATE TEMP TABLE claim AS SELECT epoch, {claims} FROM {source}{lost} GROUP BY epoch"
        )
        for name, table, where in (
            ("head", "epochs", wanted), ("total", "totals", wanted), ("job", "jobs", jobs)
        ):  # fmt: skip
            source = f"(SELECT * FROM {self._view.source(table)}{where})"
            self._do(f"CREATE TEMP TABLE {name} AS SELECT * FROM {tables.latest(table, source)}")
        default = "NULL" if self._site.cluster is None else tables.quoted(self._site.cluster)
        for name in ("claim", "job"):
            self._do(f"UPDATE {name} SET cluster = {default} WHERE cluster IS NULL")

    def runs(self) -> None:
        """Table `piece`, a row of sacct with the number of its run; `known`, the runs of sacct.

        A row in state RESIZING is continued by the next one of its job.
        """
        self._do("""
            CREATE TEMP TABLE piece AS
            WITH ordered AS (
                SELECT *, lag(state) OVER job AS before, row_number() OVER job AS place FROM job
                WINDOW job AS (PARTITION BY cluster, job_id ORDER BY start_ns, submit_ns)
            ), numbered AS (
                SELECT *, sum(CASE WHEN before = 'RESIZING' THEN 0 ELSE 1 END) OVER (
                    PARTITION BY cluster, job_id ORDER BY place) AS turn
                FROM ordered
            )
            SELECT dense_rank() OVER (ORDER BY cluster, job_id, turn) AS run, *,
                coalesce(end_ns, greatest(read_ns, start_ns)) AS until_ns
            FROM numbered
        """)
        self._do("""
            CREATE TEMP TABLE known AS
            SELECT run, any_value(cluster) AS cluster, any_value(job_id) AS job_id,
                min(start_ns) AS start_ns, max(until_ns) AS until_ns,
                CASE WHEN bool_or(end_ns IS NULL) THEN NULL ELSE max(end_ns) END AS end_ns,
                min(submit_ns) AS submit_ns,
                arg_max(sluid, place) AS sluid, arg_max(state, place) AS state,
                arg_max("user", place) AS "user", arg_max(uid, place) AS uid,
                arg_max(account, place) AS account, arg_max("partition", place) AS "partition",
                arg_max(job_name, place) AS job_name, arg_max(cpus, place) AS cpus,
                arg_max(restarts, place) AS restarts,
                sum(elapsed_s) AS elapsed_s, sum(cpu_time_s) AS cpu_time_s, count(*) AS pieces
            FROM piece GROUP BY run
        """)
        lists = self._do("SELECT DISTINCT node_list FROM piece").fetchall()
        expanded = [(text, node) for (text,) in lists for node in nodelist.expand(text)]
        self._table("list_node", ("node_list", "node"), expanded)
        self._do("""
            CREATE TEMP TABLE run_node AS
            SELECT DISTINCT run, node FROM piece JOIN list_node USING (node_list)
        """)

    def _table(self, name: str, columns: tuple[str, str], rows: list[tuple[str, str]]) -> None:
        with tables.loaded(dict.fromkeys(columns, "VARCHAR"), rows) as source:
            self._do(f"CREATE TEMP TABLE {name} AS FROM {source}")

    def resolve(self) -> None:
        """Table `resolved`: epoch, run of sacct or NULL, status.

        By SLUID; else by cluster, job id and start; else by job id, node and time. The
        first of these that has candidates decides; more than one candidate is nobody.
        """
        self._do("""
            CREATE TEMP TABLE span AS
            SELECT epoch, min(begin_ns) AS begin_ns, max(end_ns) AS end_ns,
                any_value(origin) AS origin
            FROM head GROUP BY epoch
        """)
        self._do(f"""
            CREATE TEMP TABLE candidate AS
            WITH e AS (
                SELECT c.epoch, c.cluster, c.job_id, c.sluid, c.start_ns, c.node,
                    coalesce(s.begin_ns, s.end_ns) AS begin_ns, s.end_ns
                FROM claim c JOIN span s USING (epoch)
            ), named AS (
                SELECT e.*, k.run, k.start_ns AS run_start, k.until_ns AS run_end,
                    e.node IS NULL OR n.node IS NOT NULL AS on_node
                FROM e JOIN known k ON k.job_id = e.job_id
                    AND (e.cluster IS NULL OR k.cluster IS NULL OR e.cluster = k.cluster)
                LEFT JOIN run_node n ON n.run = k.run AND n.node = e.node
            )
            SELECT e.epoch, k.run, 1 AS way FROM e JOIN known k ON k.sluid = e.sluid
                AND (e.cluster IS NULL OR k.cluster IS NULL OR e.cluster = k.cluster)
            UNION ALL
            SELECT DISTINCT e.epoch, p.run, 2 FROM e JOIN piece p
                ON p.job_id = e.job_id AND p.start_ns = e.start_ns
                AND (e.cluster IS NULL OR p.cluster IS NULL OR e.cluster = p.cluster)
            UNION ALL
            SELECT epoch, run, 3 FROM named
            WHERE on_node AND begin_ns <= run_end AND end_ns >= run_start
            UNION ALL
            SELECT epoch, run, 4 FROM named
            WHERE on_node AND begin_ns <= run_end + {CLOCK_SKEW_NS}
                AND end_ns >= run_start - {CLOCK_SKEW_NS}
        """)
        self._do("""
            CREATE TEMP TABLE resolved AS
            WITH best AS (
                SELECT epoch, way, count(*) AS candidates, any_value(run) AS run
                FROM candidate GROUP BY epoch, way
                QUALIFY row_number() OVER (PARTITION BY epoch ORDER BY way) = 1
            ), in_sacct AS (SELECT DISTINCT cluster, job_id FROM known)
            SELECT s.epoch, CASE WHEN b.candidates = 1 THEN b.run END AS run,
                CASE WHEN b.candidates = 1 THEN 'sacct'
                    WHEN b.candidates > 1 OR EXISTS (
                        SELECT 1 FROM in_sacct i WHERE i.job_id = c.job_id
                        AND (i.cluster IS NULL OR c.cluster IS NULL OR i.cluster = c.cluster))
                    THEN 'unresolved' ELSE 'unknown' END AS status
            FROM span s JOIN claim c USING (epoch) LEFT JOIN best b USING (epoch)
        """)

    def members(self) -> None:
        """Table `member`: each epoch that counts with the number of its run; and `run`.

        Epochs that sacct does not know make runs of their own, numbered after sacct's.
        Of a run on a node one source counts: where there are batches, upstream's JSON
        of the same run and node does not.
        """
        self._do("""
            CREATE TEMP TABLE grouped AS
            SELECT r.epoch, r.run, r.status, s.origin, c.node, s.begin_ns, s.end_ns,
                c.cluster, c.job_id,
                CASE WHEN r.run IS NOT NULL THEN NULL
                    WHEN c.job_id IS NULL OR (c.start_ns IS NULL AND c.start_text IS NULL)
                    THEN struct_pack(a := '', b := '', c := 0::BIGINT, d := '', e := r.epoch)
                    ELSE struct_pack(a := r.status, b := c.cluster, c := c.job_id,
                        d := coalesce(c.start_ns::VARCHAR, c.start_text), e := NULL) END AS own
            FROM resolved r JOIN claim c USING (epoch) JOIN span s USING (epoch)
        """)
        self._do("""
            CREATE TEMP TABLE numbered AS
            SELECT *, CASE WHEN run IS NOT NULL THEN run ELSE
                coalesce((SELECT max(run) FROM known), 0)
                + dense_rank() OVER (ORDER BY run IS NOT NULL, own) END AS number
            FROM grouped
        """)
        self._do("""
            CREATE TEMP TABLE member AS
            SELECT n.number AS run, n.epoch, n.status, n.origin, n.node, n.begin_ns, n.end_ns,
                h.mode, h.loader, h.final_reason, h.unclaimed, h.cgroup_cpu_ns,
                h.attributed_cpu_ns, h.outside_cpu_ns, h.age_ns, h.unattributed_by, h.lost,
                h.processes, h.job_id, h.vouched
            FROM numbered n JOIN (
                SELECT * FROM head QUALIFY row_number() OVER (
                    PARTITION BY epoch ORDER BY generation DESC, sequence DESC, tie DESC) = 1
            ) h USING (epoch)
            WHERE NOT (n.origin = 'sams-json' AND EXISTS (
                SELECT 1 FROM numbered b
                WHERE b.number = n.number AND b.origin = 'batch'
                AND b.node IS NOT DISTINCT FROM n.node))
        """)
        self._do("""
            CREATE TEMP TABLE said AS
            WITH c AS (
                SELECT m.run, c.*, struct_pack(a := m.end_ns, b := m.epoch) AS moment,
                    m.status, m.begin_ns AS b,
                    m.end_ns AS e
                FROM member m JOIN claim c USING (epoch)
            )
            SELECT run, any_value(status) AS status, arg_max(cluster, moment) AS cluster,
                arg_max(job_id, moment) AS job_id, arg_max(start_ns, moment) AS start_ns,
                arg_max(start_text, moment) AS start_text, arg_max(submit_ns, moment) AS submit_ns,
                arg_max(sluid, moment) AS sluid, arg_max("user", moment) AS "user",
                arg_max(uid, moment) AS uid, arg_max(account, moment) AS account,
                arg_max("partition", moment) AS "partition", arg_max(job_name, moment) AS job_name,
                arg_max(cpus, moment) AS cpus, arg_max(nodes, moment) AS nodes,
                arg_max(restart_count, moment) AS restarts,
                min(b) AS begin_ns, max(e) AS end_ns
            FROM c GROUP BY run
        """)
        self._do("""
            CREATE TEMP TABLE seen AS
            SELECT run, count(*) AS epochs, count(DISTINCT coalesce(node, '')) AS nodes,
                count(*) FILTER (final_reason IS NULL) AS not_final,
                count(*) FILTER (lost IS NOT NULL) AS lossy,
                count(*) FILTER (mode = 'proc') AS in_proc,
                count(*) FILTER (unclaimed = 1) AS unclaimed
            FROM member GROUP BY run
        """)
        self._do("""
            CREATE TEMP TABLE run AS
            SELECT coalesce(k.run, s.run) AS run,
                CASE WHEN k.run IS NOT NULL THEN 'sacct' ELSE s.status END AS status,
                coalesce(k.cluster, s.cluster) AS cluster, coalesce(k.job_id, s.job_id) AS job_id,
                coalesce(k.start_ns, s.start_ns) AS start_ns, s.start_text,
                coalesce(k.submit_ns, s.submit_ns) AS submit_ns,
                k.end_ns, k.state, coalesce(k.sluid, s.sluid) AS sluid,
                coalesce(k."user", s."user") AS "user", coalesce(k.uid, s.uid) AS uid,
                coalesce(k.account, s.account) AS project,
                coalesce(k."partition", s."partition") AS "partition",
                coalesce(k.job_name, s.job_name) AS job_name,
                coalesce(k.cpus, s.cpus) AS cpus, s.cpus AS claimed_cpus,
                coalesce(k.restarts, s.restarts) AS restarts,
                k.elapsed_s, k.cpu_time_s,
                greatest(coalesce((SELECT count(*) FROM run_node n WHERE n.run = k.run), 0),
                    coalesce(s.nodes, 0)) AS nodes,
                coalesce(e.nodes, 0) AS nodes_seen, coalesce(e.epochs, 0) AS epochs,
                coalesce(e.not_final, 0) AS not_final, coalesce(e.lossy, 0) AS lossy,
                coalesce(e.in_proc, 0) AS in_proc, coalesce(e.unclaimed, 0) AS unclaimed,
                s.begin_ns AS first_ns, s.end_ns AS last_ns,
                k.run IS NOT NULL AND k.end_ns IS NULL AS running
            FROM known k FULL OUTER JOIN said s ON s.run = k.run LEFT JOIN seen e
                ON e.run = coalesce(k.run, s.run)
        """)

    def cpu(self) -> None:
        """Table `used`: CPU by run, month, class, path and flags: increments of the counters."""
        self._do("""
            CREATE TEMP TABLE path AS
            SELECT row_number() OVER (ORDER BY path) AS path_id, path
            FROM (SELECT DISTINCT path FROM total)
        """)
        self._do("""
            CREATE TEMP TABLE several AS
            SELECT epoch FROM head GROUP BY epoch HAVING count(*) > 1
        """)
        self._do("""
            CREATE TEMP TABLE step AS
            SELECT m.run, t.epoch, t.month, p.path_id, t.flags, t.cpu_ns AS cpu_ns
            FROM total t JOIN member m USING (epoch) JOIN path p USING (path)
            WHERE NOT EXISTS (SELECT 1 FROM several s WHERE s.epoch = t.epoch)
            UNION ALL
            SELECT m.run, t.epoch, t.month, p.path_id, t.flags,
                t.cpu_ns - coalesce(lag(t.cpu_ns) OVER (
                    PARTITION BY t.epoch, t.path, t.flags
                    ORDER BY t.generation, t.sequence, t.tie), 0)
            FROM total t JOIN member m USING (epoch) JOIN path p USING (path)
            WHERE EXISTS (SELECT 1 FROM several s WHERE s.epoch = t.epoch)
        """)
        self._do("""
            CREATE TEMP TABLE ledger AS
            SELECT m.run, h.epoch, h.month,
                coalesce(h.cgroup_cpu_ns, h.attributed_cpu_ns) - coalesce(
                    lag(coalesce(h.cgroup_cpu_ns, h.attributed_cpu_ns)) OVER e, 0) AS charged,
                h.outside_cpu_ns - coalesce(lag(h.outside_cpu_ns) OVER e, 0) AS outside
            FROM head h JOIN member m USING (epoch)
            WINDOW e AS (PARTITION BY h.epoch ORDER BY h.generation, h.sequence, h.tie)
        """)
        self._do("""
            CREATE TEMP TABLE used AS
            WITH pieces AS (
                SELECT run, month, CASE WHEN flags & 32 > 0 THEN 'outside' ELSE 'path' END AS class,
                    path_id, flags, cpu_ns::HUGEINT AS cpu_ns FROM step
                UNION ALL
                SELECT run, month, 'unattributed', NULL, NULL, charged FROM ledger
                UNION ALL
                SELECT run, month, 'unattributed', NULL, NULL, -cpu_ns FROM step
                WHERE flags & 32 = 0
                UNION ALL
                SELECT run, month, 'outside', NULL, NULL, outside FROM ledger
                UNION ALL
                SELECT run, month, 'outside', NULL, NULL, -cpu_ns FROM step WHERE flags & 32 > 0
            )
            SELECT run, month, class, path_id, flags, sum(cpu_ns) AS cpu_ns FROM pieces
            GROUP BY ALL
        """)

    def core(self) -> None:
        """Table `cored`: core-time of sacct's runs by month, with data and without."""
        months = of_zone(self._site.zone)
        self._connection.register(
            "months_in",
            {
                "month": integers(months.numbers),
                "begins": integers(months.starts_ns),
                "ends": integers([*months.starts_ns[1:], 2**63 - 1]),
            },
        )
        self._do("""
            CREATE TEMP TABLE in_month AS
            WITH m AS (
                SELECT * FROM months_in
                WHERE ends > (SELECT min(start_ns) FROM piece)
                AND begins <= (SELECT max(until_ns) FROM piece)
            ), weighed AS (
                SELECT p.run, p.place, p.cpu_time_s::HUGEINT * 1000000 AS whole, m.month,
                    CASE WHEN p.until_ns > p.start_ns
                        THEN least(p.until_ns, m.ends) - greatest(p.start_ns, m.begins)
                        ELSE 1 END::HUGEINT AS weight
                FROM piece p JOIN m ON m.ends > p.start_ns
                    AND (m.begins < p.until_ns OR m.begins <= p.start_ns)
            ), parts AS (
                SELECT *, sum(weight) OVER w AS total, whole * weight // sum(weight) OVER w AS part
                FROM weighed WINDOW w AS (PARTITION BY run, place)
            )
            SELECT run, place, month, part + CASE WHEN row_number() OVER (
                    PARTITION BY run, place ORDER BY whole * weight % total DESC, month)
                    <= whole - sum(part) OVER (PARTITION BY run, place) THEN 1 ELSE 0 END AS core_us
            FROM parts
        """)
        self._connection.unregister("months_in")
        # Epochs on nodes that no list of their run names cover one node each all the same:
        # the collector may know the node by another name.
        self._do("""
            CREATE TEMP TABLE covered AS
            WITH here AS (SELECT DISTINCT run, coalesce(node, '') AS node FROM member
                    WHERE status = 'sacct'),
            strangers AS (
                SELECT h.run, count(*) AS n FROM here h
                ANTI JOIN run_node r ON r.run = h.run AND r.node = h.node GROUP BY h.run),
            listed AS (
                SELECT p.run, p.place, count(*) AS n, count(h.node) AS present
                FROM piece p JOIN list_node l USING (node_list)
                LEFT JOIN here h ON h.run = p.run AND h.node = l.node
                GROUP BY p.run, p.place)
            SELECT p.run, p.place,
                coalesce(l.n, greatest(p.nodes, 1), 1) AS n,
                least(coalesce(l.n, greatest(p.nodes, 1), 1),
                    coalesce(l.present, 0) + coalesce(s.n, 0)) AS present
            FROM piece p LEFT JOIN listed l ON l.run = p.run AND l.place = p.place
            LEFT JOIN strangers s ON s.run = p.run
        """)
        self._do("""
            CREATE TEMP TABLE cored AS
            SELECT run, month, sum(core_us - core_us * (n - present) // n) AS with_data,
                sum(core_us * (n - present) // n) AS without_data
            FROM in_month JOIN covered USING (run, place) GROUP BY run, month
        """)

    def result(self) -> None:
        """Table `account`. Core-time with data is shared out by the CPU used in its month.

        A month without CPU of a run that used some in others is shared out as the whole.
        """
        self._do("""
            CREATE TEMP TABLE weight AS
            WITH positive AS (
                SELECT run, month, class, path_id, flags, greatest(cpu_ns, 0) AS w FROM used
            ), overall AS (
                SELECT run, class, path_id, flags, greatest(sum(cpu_ns), 0) AS w
                FROM used GROUP BY ALL
            ), busy AS (SELECT run, month FROM positive GROUP BY ALL HAVING sum(w) > 0)
            SELECT c.run, c.month, c.with_data AS whole, p.class, p.path_id, p.flags, p.w
            FROM cored c JOIN busy b USING (run, month) JOIN positive p USING (run, month)
            WHERE p.w > 0
            UNION ALL
            SELECT c.run, c.month, c.with_data, o.class, o.path_id, o.flags, o.w
            FROM cored c ANTI JOIN busy b USING (run, month) JOIN overall o USING (run)
            WHERE o.w > 0
        """)
        share_out(self._connection, ("run", "month"), ("class", "path_id", "flags"))
        self._do("""
            CREATE TEMP TABLE account AS
            WITH every AS (
                SELECT run, month, class, path_id, flags, cpu_ns, 0::HUGEINT AS core_us FROM used
                UNION ALL
                SELECT run, month, class, path_id, flags, 0, core_us FROM shared
                UNION ALL
                SELECT run, month, 'no data', NULL, NULL, 0, without_data FROM cored
                WHERE without_data > 0
                UNION ALL
                SELECT c.run, c.month, 'no CPU', NULL, NULL, 0, c.with_data FROM cored c
                ANTI JOIN (SELECT DISTINCT run, month FROM weight) w USING (run, month)
                WHERE c.with_data > 0
            )
            SELECT run, month, class, path_id, flags,
                sum(cpu_ns)::DECIMAL(38, 0) AS cpu_ns, sum(core_us)::BIGINT AS core_us
            FROM every GROUP BY ALL
            HAVING sum(cpu_ns) <> 0 OR sum(core_us) <> 0 OR class = 'path'
            ORDER BY run, month, class, path_id, flags
        """)


# 2^127 and a little less: products are compared as doubles.
_MOST: Final = 1.7e38


def share_out(connection: Any, of: Sequence[str], by: Sequence[str]) -> None:  # noqa: ANN401
    """Table `shared` from `weight`: each `whole` of its group `of`, by the weights `w` above 0.

    What is left goes to the largest remainders, of equal ones to the lower key `by`. A group
    whose products do not fit into 128 bits, which takes a whole site for weeks or a node that
    tells nonsense, is shared out here and not by the database.
    """
    groups, keys = ", ".join(of), ", ".join(by)
    vast = connection.execute(
        f"SELECT {groups}, any_value(whole)::VARCHAR, list(struct_pack({keys}, w := w::VARCHAR))"
        f" FROM weight SEMI JOIN (SELECT {groups} FROM weight GROUP BY {groups}"
        f" HAVING any_value(whole)::DOUBLE * max(w)::DOUBLE > {_MOST}) USING ({groups})"
        f" GROUP BY {groups}"
    ).fetchall()
    rows = []
    for *group, whole, parts in vast:
        # A key that is null comes first.
        weights = {
            tuple((part[name] is not None, part[name]) for name in by): int(part["w"])
            for part in parts
        }
        shares = coretime.share(int(whole), weights)
        rows += [(*group, *(value for _, value in key), str(part)) for key, part in shares.items()]
    kinds = {name: "VARCHAR" if name == "class" else "BIGINT" for name in (*of, *by)}
    with tables.loaded({**kinds, "core_us": "VARCHAR"}, rows) as source:
        connection.execute(
            f"CREATE TEMP TABLE shared AS SELECT * REPLACE (core_us::HUGEINT AS core_us)"
            f" FROM {source}"
        )
    order = ", ".join(f"{name} NULLS FIRST" for name in by)
    connection.execute(f"""
        INSERT INTO shared
        WITH parts AS (
            SELECT *, sum(w) OVER g AS total, whole * w // sum(w) OVER g AS part
            FROM weight ANTI JOIN (SELECT DISTINCT {groups} FROM shared) USING ({groups})
            WINDOW g AS (PARTITION BY {groups})
        )
        SELECT {groups}, {keys}, part + CASE WHEN row_number() OVER (
                PARTITION BY {groups} ORDER BY whole * w % total DESC, {order})
                <= whole - sum(part) OVER (PARTITION BY {groups}) THEN 1 ELSE 0 END AS core_us
        FROM parts
    """)


def paths_of(connection: Any, accounts: Accounts) -> list[bytes]:  # noqa: ANN401
    """All distinct paths, in the order of their numbers."""
    rows: Iterable[tuple[bytes]] = connection.execute(
        f"SELECT path FROM {accounts.source('path')} ORDER BY path_id"
    ).fetchall()
    return [row[0] for row in rows]
