#!/bin/sh
# The same checks as on the machines of vm.py: check.sh ROW CGROUP LOADERS
set -eu
share=$(mktemp -d)
loaders=$(printf '%s' "$3" | sed 's/[^,][^,]*/"&"/g')
printf '{"id": "%s", "cgroup": "%s", "loaders": [%s]}\n' "$1" "$2" "$loaders" >"$share/row.json"
cp /vagrant/dist/sams_ebpf-*.whl "$share"
mkdir "$share/repo"
cp -r /vagrant/tests /vagrant/pyproject.toml "$share/repo"
python3 /vagrant/vagrant/guest.py "$share"
cat "$share/result.json"
