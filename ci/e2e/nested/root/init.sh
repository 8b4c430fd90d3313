#!/bin/busybox sh
# Process 1 of the initramfs: finds the disk and hands over to its systemd.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
echo "node: the kernel runs"
# Each needs those before it.
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
	/bin/busybox insmod /modules/$module.ko
done
until [ -b /dev/vda ]; do /bin/busybox usleep 50000; done
/bin/busybox mount -t ext4 -o noatime /dev/vda /root
for dir in dev proc sys; do /bin/busybox mount --move /$dir /root/$dir; done
exec /bin/busybox switch_root /root /lib/systemd/systemd
