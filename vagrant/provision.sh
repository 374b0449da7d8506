#!/bin/sh
# Install the product as a site would: provision.sh CGROUP LOCKDOWN, then a reboot.
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
/opt/sams-ebpf/bin/pip install -q /vagrant/dist/sams_ebpf-*.whl pytest pytest-timeout \
    pytest-asyncio hypothesis

printf 'site:\n  cluster: vagrant\n' >/etc/sams-ebpf.yaml
/opt/sams-ebpf/bin/sams-ebpf install-units --program /opt/sams-ebpf/bin/sams-ebpf \
    --config /etc/sams-ebpf.yaml
systemd-sysusers
systemd-tmpfiles --create
systemctl daemon-reload
systemctl enable sams-ebpf-load.service sams-ebpf-ship.service

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
