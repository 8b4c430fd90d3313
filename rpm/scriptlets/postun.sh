if [ -d /run/systemd/system ] && command -v systemctl >/dev/null 2>&1; then
    systemctl daemon-reload >/dev/null 2>&1 || :
    if [ "$1" -ge 1 ]; then
        # At an upgrade and a downgrade, if the daemon runs: the daemon only, never the pods. Returns when the
        # new one has adopted them.
        systemctl try-restart kuasar-vmm.service >/dev/null 2>&1 ||
            echo "kuasar: the daemon did not come up again; the pods run on. See: journalctl -u kuasar-vmm"
    fi
fi
exit 0
