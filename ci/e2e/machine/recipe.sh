mkdir -p /etc/dnf/vars /etc/yum.repos.d /etc/rpm
# Debian keeps root's own package database in the home directory, and has no program named yum.
echo '%_dbpath /var/lib/rpm' >/etc/rpm/macros
ln -sf dnf-3 /usr/bin/yum
echo 22.03LTS >/etc/dnf/vars/releasever

# Units that would ask a person, change the host's kernel, or wait for what is not there.
for unit in systemd-firstboot.service systemd-sysctl.service console-getty.service \
	apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
	dnf-makecache.timer; do
	ln -sf /dev/null /etc/systemd/system/$unit
done
# RPM distributions enable nothing that no preset names; Debian everything.
mkdir -p /etc/systemd/system-preset /etc/systemd/journald.conf.d
echo 'disable *' >/etc/systemd/system-preset/99-default-disable.preset
printf '[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n' >/etc/systemd/journald.conf.d/tests.conf

rm -rf /var/cache/apt/archives/*.deb /var/lib/apt/lists/* /var/log/*.log
rm -f /etc/machine-id
: >/etc/machine-id
