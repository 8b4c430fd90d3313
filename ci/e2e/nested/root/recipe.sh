# What turns the root file system of a machine into that of a node with a kernel of its own. It runs in
# the copy, with "sh -ec".
export DEBIAN_FRONTEND=noninteractive
apt-get --quiet update
# udev loads the modules of the devices that there are, KVM's too, as on every node.
apt-get --quiet install --assume-yes --no-install-recommends udev ncat

# The kernel's package wants an initramfs made here, which a machine of one known disk need not have.
kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
mkdir /tmp/kernel
cd /tmp/kernel
apt-get --quiet download "$kernel"
# Not over the root, where /lib is a link.
dpkg-deb --extract ./*.deb /tmp/kernel/files
release=${kernel#linux-image-}
mkdir -p /usr/lib/modules
mv "files/lib/modules/$release" /usr/lib/modules/
mv "files/boot/vmlinuz-$release" /boot/vmlinuz
cd /
rm -rf /tmp/kernel
depmod --all "$release"
mkdir /boot/modules
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
	cp "$(modinfo --set-version "$release" --field filename "$module")" /boot/modules/
done

# The console is for the kernel and the signs of life.
for unit in serial-getty@.service getty@.service getty.target systemd-udev-settle.service \
	systemd-networkd-wait-online.service systemd-timesyncd.service systemd-update-utmp.service; do
	ln -sf /dev/null "/etc/systemd/system/$unit"
done
# This is a kernel of its own, so the settings may be applied.
rm -f /etc/systemd/system/systemd-sysctl.service
systemctl enable node-alive.service node-scenarios.service
mkdir -p /node /opt/cni /etc/cni/net.d
ln -s /node/programs/containerd /usr/bin/containerd
ln -s /node/programs /opt/cni/bin
echo node >/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 node\n' >/etc/hosts
rm -rf /var/cache/apt/archives/*.deb /var/lib/apt/lists/*
