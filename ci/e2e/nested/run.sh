# Runs the scenarios on the node, from its second disk. Standard output is the transcript; a port has one
# writer at a time, which hands it on.
exec >/dev/virtio-ports/transcript 2>&1 </dev/null
cd /root
systemctl is-system-running --wait
echo "node: up after $(cut -d' ' -f1 /proc/uptime) s"
PATH=/node/bin:$PATH KUASAR_NODE=1 /node/bin/scenarios -test.v -test.failfast -test.timeout="$(cat /node/limit)" -test.run='^TestOnNode$'
status=$?
mkdir -p /run/collected
journalctl --no-pager --output=short-precise --unit=kuasar-vmm >/run/collected/kuasar-vmm.log
journalctl --no-pager --output=short-precise --unit=containerd >/run/collected/containerd.log
journalctl --no-pager --output=short-precise --boot >/run/collected/journal.log
cp /run/kuasar-vmm/*/sandbox-*.log /var/log/pods/*/*.log /run/collected/ 2>/dev/null
tar -C /run/collected -cf /dev/virtio-ports/collected .
echo "node: the scenarios ended with status $status"
