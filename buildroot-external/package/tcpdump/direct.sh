# Its own search for libpcap would ask the host's pkg-config and pcap-config.
export PKG_CONFIG=false PCAP_CONFIG=false
export CFLAGS="$CFLAGS -include fcntl.h -I$DEP_libpcap/include" LDFLAGS="$LDFLAGS -L$DEP_libpcap/lib"
./configure --host=riscv32-linux --prefix=/usr --without-crypto --without-smi --without-cap-ng \
    --disable-smb
make -s -j"$JOBS" tcpdump
mkdir -p "$OUT/usr/bin"
$STRIP -o "$OUT/usr/bin/tcpdump" tcpdump
chmod 755 "$OUT/usr/bin/tcpdump"
