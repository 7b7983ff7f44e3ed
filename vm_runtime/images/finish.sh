# Turns the installed root ($1) into the files of an image, as the last hook of mmdebstrap: there, root is root also
# in a user namespace, and the root can be entered. What comes in and goes out lies in $1/hypercell-build.
# Given as text to `sh -c` (a namespace's root may not read this file). Lines 'hypercell-step: ...' are told to the person who waits.
set -eu
root=$1
build=$root/hypercell-build
out=$build/out
mkdir -p "$out"
exec 2>&1

enter() {
    chroot "$root" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive "$@"
}

# vmlinux and its modules are for the initramfs; inside the image nothing loads them.
enter dpkg-query -W -f '${db:Status-Status} ${Package} ${Version}\n' 'linux-image-*' busybox-static |
    sed -n 's/^installed //p' >"$out/kernel-packages"
mv "$root"/boot/vmlinuz-* "$out/vmlinuz"
mv "$root"/usr/lib/modules/* "$out/modules"
cp "$root/bin/busybox" "$out/busybox"
# Its prerm asks for confirmation where the host runs the same version.
rm -f "$root"/var/lib/dpkg/info/linux-image-*.prerm
# Only what the recipe names stays, with what it needs: mmdebstrap marks more than that as wanted (usrmerge and all of Perl).
enter apt-mark showmanual | xargs chroot "$root" apt-mark auto >/dev/null
xargs chroot "$root" apt-mark manual <"$build/packages" >/dev/null
enter apt-get -q -y -o APT::AutoRemove::RecommendsImportant=false -o APT::AutoRemove::SuggestsImportant=false purge --autoremove 'linux-image-.*' usrmerge
enter dpkg-query -W -f '${Package} ${Version}\n' >"$out/debian-packages"

# The whole machine is the user's own: pip may install beside Debian's packages (PEP 668).
rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
while read -r path; do
    enter rm -rf -- "$path"
done <"$build/remove"

if [ -s "$build/warmup.py" ]; then
    echo "hypercell-step: Running the warm-up once"
    enter /hypercell-build/with-environment python3 /hypercell-build/warmup.py || {
        echo "hypercell-warmup-failed"
        exit 1
    }
fi

echo "hypercell-step: Compiling Python modules"
# By hash and unchecked: all times become equal below, so modules compiled by time would be compiled again in each machine.
# Its status is that of the worst file, and packages do ship files that are not meant to compile.
enter python3 -m compileall -q -q -f -j 0 --invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.11 /usr/local/lib || true

echo "hypercell-step: Packing the root file system"
rm -rf "$root"/boot/* "$root"/vmlinuz* "$root"/initrd.img* "$root"/usr/lib/modules \
    "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/info/* "$root"/usr/share/locale/* \
    "$root"/usr/share/lintian "$root"/usr/local/man "$root"/usr/local/share/man \
    "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/cache/debconf/*-old "$root"/var/cache/ldconfig/aux-cache \
    "$root"/var/lib/dpkg/*-old "$root"/var/log/* "$root"/root/.cache/pip "$root"/etc/machine-id "$root"/etc/resolv.conf
: >"$root/etc/machine-id"
: >"$root/etc/resolv.conf"
echo sandbox >"$root/etc/hostname"
printf '127.0.0.1 localhost sandbox\n::1 localhost sandbox\n' >"$root/etc/hosts"
read -r uuid <"$build/uuid"
# Seen through a bind mount, since mkfs.erofs 1.5 stumbles over what is mounted below (/proc), even where it is excluded.
mkdir "$build/root"
mount --bind "$root" "$build/root"
mkfs.erofs --quiet -zlz4hc,12 -C65536 -T1700000000 -U"$uuid" \
    --exclude-regex='^(dev|proc|sys|run|tmp|hypercell-build)/' --exclude-path=hypercell-build "$out/rootfs.erofs" "$build/root"
umount "$build/root"
