#!/bin/busybox sh
# /init of every image: loads the drivers, mounts the root (image below, the machine's own disk above) and hands over.
# Runs in busybox, before anything of the image is there. What comes after, /hypercell/start, is the guest code; it lies in
# a second archive that the template builder appends to this one, so that an image need not be rebuilt when the guest changes.
export PATH=/bin

stop() {
    echo "hypercell-init: $1" >/dev/console
    # With ACPI this ends the VMM process; the loop is for VMMs without it, since the death of init is a panic.
    busybox poweroff -f
    while :; do busybox sleep 3600; done
}

mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o mode=0755,nosuid devtmpfs /dev
exec </dev/console >/dev/console 2>&1

while read -r module; do
    insmod "/modules/$module" || stop "The kernel module $module does not load; rebuild the image."
done </modules/order

# virtio_mmio finds its devices when it loads, virtio_blk makes its nodes at once: no waiting is needed.
[ -b /dev/vda ] || stop "The machine has no first disk (/dev/vda, the image); its VMM was started without it."
[ -b /dev/vdb ] || stop "The machine has no second disk (/dev/vdb, its writable space); its VMM was started without it."
mount -t erofs -o ro /dev/vda /image || stop "The image on /dev/vda does not mount; verify it with 'hypercelld image ls'."
mount -t ext4 -o noatime /dev/vdb /disk || stop "The disk on /dev/vdb does not mount; it must hold an ext4 file system."
mkdir -p /disk/upper /disk/work
mount -t overlay -o lowerdir=/image,upperdir=/disk/upper,workdir=/disk/work overlay /newroot ||
    stop "The root file system does not mount (overlay of /dev/vda and /dev/vdb)."

[ -f /hypercell/start ] || stop "There is no /hypercell/start; the guest archive was not appended to this initramfs."
exec /bin/sh /hypercell/start /newroot
