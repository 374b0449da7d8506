#!/bin/sh
# Install what the product needs, and the product: provision.sh CGROUP LOCKDOWN, then a reboot.
# Units and configuration are what check.sh tries.
set -eu
cgroup=$1 lockdown=$2

if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -qy --no-install-recommends \
        python3-venv libbpf1 python3-bpfcc "linux-headers-$(uname -r)" gcc libc6-dev ||
        apt-get install -qy --no-install-recommends python3-venv libbpf0 gcc libc6-dev
else
    dnf install -qy python3.11 libbpf python3-bcc "kernel-devel-$(uname -r)" gcc glibc-static
fi
python=$(command -v python3.11 || command -v python3)
"$python" -m venv /opt/sams-ebpf
wheel=$(echo /vagrant/dist/sams_ebpf-*.whl)
/opt/sams-ebpf/bin/pip install -q "$wheel[receiver]" pytest pytest-timeout pytest-asyncio hypothesis

options=
[ "$cgroup" = v1 ] && options="systemd.unified_cgroup_hierarchy=0"
[ "$cgroup" = v2 ] && options="systemd.unified_cgroup_hierarchy=1"
[ "$lockdown" = none ] || options="$options lockdown=$lockdown"
sed -i "s/^GRUB_CMDLINE_LINUX=\"/&$options /" /etc/default/grub
if command -v update-grub >/dev/null; then
    update-grub
else
    grub2-mkconfig -o /boot/grub2/grub.cfg
fi
