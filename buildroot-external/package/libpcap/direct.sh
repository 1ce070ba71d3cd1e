./configure --host=riscv32-linux --prefix=/usr --with-pcap=linux --disable-shared --without-libnl --disable-usb \
    --disable-netmap --disable-bluetooth --disable-dbus --disable-rdma --without-dag --without-septel --without-snf \
    --without-turbocap --without-dpdk --disable-remote
make -s -j"$JOBS" libpcap.a
mkdir -p "$OUT/include/pcap" "$OUT/lib"
cp libpcap.a "$OUT/lib/"
cp pcap.h pcap-bpf.h pcap-namedb.h "$OUT/include/"
cp pcap/*.h "$OUT/include/pcap/"
