if command -v systemctl >/dev/null 2>&1; then
    if [ "$1" -eq 1 ]; then
        # Later than at the first installation, whether the service is enabled is the administrator's matter.
        systemctl --no-reload preset kuasar-vmm.service >/dev/null 2>&1 || :
    fi
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload >/dev/null 2>&1 || :
        # What modules-load.d has done at the next boot, so that the service can be started before it.
        if [ "$1" -eq 1 ] && [ -x /usr/lib/systemd/systemd-modules-load ]; then
            /usr/lib/systemd/systemd-modules-load kuasar.conf >/dev/null 2>&1 || :
        fi
    fi
fi
exit 0
