./configure --host=riscv32-linux --prefix=/usr --sysconfdir=/etc --disable-nftables --disable-shared --enable-static \
    --disable-ipv6 --disable-devel --disable-libipq --disable-bpf-compiler --disable-nfsynproxy --disable-connlabel
# libtool takes -static for its own; -all-static reaches the linker.
make -s -j"$JOBS" LDFLAGS="$LDFLAGS -all-static"
mkdir -p "$OUT/usr/sbin" "$OUT/run" "$OUT/etc"
$STRIP -o "$OUT/usr/sbin/xtables-legacy-multi" iptables/xtables-legacy-multi
chmod 755 "$OUT/usr/sbin/xtables-legacy-multi"
for name in iptables iptables-save iptables-restore; do
    ln -s xtables-legacy-multi "$OUT/usr/sbin/$name"
done
