#!/bin/sh
# The same checks as on the machines of vm.py: check.sh CGROUP [LOADER…], as root.
set -eu
cgroup=$1
shift
steps='"install", "probe", "unit", "work-proc", "unpack"'
[ $# -gt 0 ] || steps="$steps, \"tests-proc\""
for loader; do
    [ "$loader" != libbpf ] || steps="$steps, \"work-libbpf\""
    # Those that the same set serves follow one another; the one that needs another set is last.
    for stage in default split exact small; do
        [ "$loader-$stage" = bcc-small ] || steps="$steps, \"tests-$loader-$stage\""
    done
done

share=$(mktemp -d)
printf '{"cgroup": "%s", "scale": 1, "end_s": 7200, "steps": [%s]}\n' "$cgroup" "$steps" >"$share/row.json"
cp /vagrant/dist/sams_ebpf-*.whl /vagrant/receiver/systemd/sams-receiver.service "$share"
mkdir "$share/repo" "$share/unpacked"
cp -r /vagrant/tests /vagrant/pyproject.toml "$share/repo"
python3 -m zipfile -e "$share"/sams_ebpf-*.whl "$share/unpacked"
tar -C "$share" -cf "$share/tests.tar" repo unpacked
python3 /vagrant/vagrant/guest.py "$share"
cat "$share/result.json"
