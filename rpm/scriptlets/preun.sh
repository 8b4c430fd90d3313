# At an upgrade nothing is stopped: the new package's daemon takes over from the old one's, see %postun.
if [ "$1" -eq 0 ]; then
    if command -v systemctl >/dev/null 2>&1; then
        if [ -d /run/systemd/system ]; then
            # KillMode=process: this ends the daemon and leaves the pods' hypervisors alone.
            systemctl --no-reload disable --now kuasar-vmm.service >/dev/null 2>&1 || :
        else
            systemctl --no-reload disable kuasar-vmm.service >/dev/null 2>&1 || :
        fi
    fi

    # The state directory, unless the options name another one.
    dir=/run/kuasar-vmm
    if [ -r /etc/sysconfig/kuasar-vmm ]; then
        while read -r line || [ -n "$line" ]; do
            case $line in
            OPTIONS=*)
                previous=
                for word in $(echo "${line#OPTIONS=}" | tr -d "\"'"); do
                    case $word in
                    --dir=* | -dir=*) dir=${word#*=} ;;
                    esac
                    case $previous in
                    --dir | -dir) dir=$word ;;
                    esac
                    previous=$word
                done
                ;;
            esac
        done </etc/sysconfig/kuasar-vmm
    fi
    pods=0
    for journal in "$dir"/*/sandbox.json; do
        if [ -f "$journal" ]; then
            pods=$((pods + 1))
        fi
    done
    if [ "$pods" -gt 0 ]; then
        echo "kuasar: the daemon is stopped, but $pods pod(s) run on in their virtual machines."
        echo "kuasar: What is known of them is in $dir. Leave it there: when kuasar is installed again,"
        echo "kuasar: \"systemctl start kuasar-vmm\" adopts them. Then \"crictl rmp -f\" removes them;"
        echo "kuasar: without kuasar, a reboot ends them. The engine's connections are lost with the daemon,"
        echo "kuasar: and it may report their containers as exited."
    else
        # What daemons leave to their successors. No pod is there, and nothing is removed that is a directory.
        for left in "$dir"/.lock "$dir"/.kvm "$dir"/.metrics.sock /run/vmm-sandboxer.sock; do
            unlink "$left" 2>/dev/null || :
        done
        rmdir "$dir" 2>/dev/null || :
    fi
fi
exit 0
