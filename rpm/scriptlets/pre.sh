# Keep what was put here by hand, as "make install" of Kuasar does: RPM would write over it without a word.
# Configuration files are not in the list, for RPM leaves those alone.
if [ "$1" -eq 1 ]; then
    for f in /usr/local/bin/vmm-sandboxer /usr/bin/vmm-sandboxer /var/lib/kuasar/vmlinux.bin /var/lib/kuasar/kuasar.initrd; do
        if [ -f "$f" ] && [ ! -L "$f" ]; then
            mv -f "$f" "$f.rpmorig" && echo "kuasar: $f belonged to no package and is now $f.rpmorig" || :
        fi
    done
fi
exit 0
