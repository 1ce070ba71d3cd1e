#!/bin/sh
# distribution.sh BUILDROOT DIR: lets Buildroot be run by hand where only the distribution's archive (and the Python
# package index) can be reached. Fills DIR with a compiler and sources made of Debian's packages, and with defconfigs
# that use them: DIR is a second BR2_EXTERNAL tree.
#
#   sh buildroot-external/buildroot/distribution.sh BUILDROOT /tmp/lg
#   make -C BUILDROOT BR2_EXTERNAL=$PWD/buildroot-external:/tmp/lg O=/tmp/lean lean_defconfig && make -C /tmp/lean

set -eu
export LC_ALL=C TZ=UTC PATH=/usr/sbin:/usr/bin:/sbin:/bin
umask 022
if [ $# != 2 ] || [ ! -f "$1/Makefile" ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
here=$(cd "${0%/*}/.." && pwd)
buildroot=$(cd "$1" && pwd)
mkdir -p "$2"
cd "$2"
out=$(pwd)
jobs=$(nproc)
say() { echo ">>> $*"; }
fail() {
    echo "error: $*" >&2
    exit 1
}

# What is missing on this machine, in one line.
missing=
need() {
    if [ ! -e "$1" ] && ! command -v "$1" > /dev/null; then missing="$missing $2"; fi
}
for pair in riscv64-linux-gnu-gcc:gcc-riscv64-linux-gnu riscv64-unknown-elf-gcc:gcc-riscv64-unknown-elf g++:g++ \
    make:make bc:bc bzip2:bzip2 cpio:cpio dpkg-source:dpkg-dev file:file patch:patch perl:perl \
    python3:python3-pip qemu-riscv32:qemu-user rsync:rsync unzip:unzip wget:wget xz:xz-utils; do
    need "${pair%:*}" "${pair#*:}"
done
table=$(sed -n 's/^host-\([^:]*\): *{ *programs: *\[\(.*\)\], *package: *\([^ ]*\) *}.*/\1|\2|\3/p' \
    "$here/buildroot/machine.yaml" | tr -d '" ')
for line in $table; do
    programs=${line#*|}
    programs=${programs%|*}
    for program in $(echo "$programs" | tr , ' '); do
        need "${program%:*}" "${line##*|}"
    done
done
[ -z "$missing" ] || fail "programs are missing; run: sudo apt-get install --no-install-recommends$missing"

# apt with lists of its own: the machine's entries for its release, source packages turned on.
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
rm -rf apt && mkdir -p apt/sources apt/lists/partial apt/archives/partial
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    [ -f "$file" ] && grep -q "^[^#]*$codename" "$file" || continue
    case $file in
    *.list) sed -n "s/^deb \(.*[ ]$codename.*\)/deb \1\ndeb-src \1/p" "$file" > "apt/sources/${file##*/}" ;;
    *.sources) sed 's/^Types:.*/Types: deb deb-src/' "$file" > "apt/sources/${file##*/}" ;;
    esac
done
cat > apt/apt.conf << C
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$out/apt/sources";
Dir::State::lists "$out/apt/lists";
Dir::Cache "$out/apt";
Acquire::Languages "none";
APT::Sandbox::User "root";
C
export APT_CONFIG="$out/apt/apt.conf"
# get SOURCE FOLDER [LEAST]: downloads the newest version (of LEAST or later) that the archive has: its lists may name
# some that are gone.
get() {
    for version in $(apt-cache showsrc --only-source "$1" 2> /dev/null | sed -n 's/^Version: //p' | sort -ruV); do
        dpkg --compare-versions "$version" ge "${3:-0}" || continue
        rm -rf "$2" && mkdir -p "$2"
        if (cd "$2" && apt-get -q source --download-only --only-source "$1=$version" > ../log 2>&1); then return; fi
    done
    return 1
}
say "package lists"
apt-get -q update > apt/log 2>&1 || { cat apt/log >&2; fail "apt-get update"; }
rm -rf dl build && mkdir dl build

say "linux: source and headers"
linux=$(apt-cache depends linux-source | sed -n 's/.*Depends: \(linux-source-[0-9.]*\)$/\1/p' | tail -n 1)
[ -n "$linux" ] || fail "this machine's apt sources for $codename have no linux-source"
series=${linux#linux-source-}
(cd build && apt-get -q download "$linux" > log 2>&1) || { cat build/log >&2; fail "download of $linux"; }
dpkg-deb --fsys-tarfile build/linux-source-*.deb |
    tar --extract --to-stdout --wildcards --file=- './usr/src/linux-source-*.tar.xz' > "dl/$linux.tar.xz"
mkdir build/linux
tar --extract --file="dl/$linux.tar.xz" --strip-components=1 -C build/linux --exclude='*/drivers/*' --exclude='*/sound/*' \
    --exclude='*/Documentation/*' --exclude='*/fs/*' --exclude='*/net/*.[ch]'
make -s -C build/linux ARCH=riscv headers

say "compiler"
# musl knows rv32 since 1.2.5. In an older distribution, the copy that Zig brings takes the place.
if get musl build/musl 1.2.5; then
    dpkg-source --no-check --extract build/musl/*.dsc build/musl-source > /dev/null
    musl=$out/build/musl-source
else
    python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
        --platform manylinux2010_x86_64 -d build ziglang==0.13.0.post1
    echo "5ff0f2cb0d583b4f94820909612043f62e4d1d9a8bed77ceec088a01fc2ef015  $(echo build/ziglang-*.whl)" | sha256sum --check --quiet
    unzip -q build/ziglang-*.whl 'ziglang/lib/libc/musl/*' 'ziglang/lib/libc/include/riscv32-linux-musl/*' -d build
    musl=$out/build/ziglang/lib/libc
fi
rm -rf direct toolchain && mkdir build/musl-objects
(cd build/musl-objects && OUT=$out/direct TOOLS=$here/direct/toolchain MUSL=$musl HEADERS=$out/build/linux/usr/include \
    JOBS=$jobs sh "$here/direct/toolchain/build.sh")
OUT=$out/toolchain TOOLS=$here/buildroot/toolchain DIRECT=$out/direct sh "$here/buildroot/toolchain/build.sh"
gcc=$(riscv64-linux-gnu-gcc -dumpversion)

# The machine's programs in place of host packages, and unpacked source packages in place of released archives.
rm -rf sources headers empty patches configs && mkdir -p sources headers empty patches/linux configs
{
    echo "# Written by distribution.sh."
    echo "LG_EMPTY = $out/empty"
    echo "include $here/buildroot/machine.mk"
    for line in $table; do
        name=$(echo "${line%%|*}" | tr a-z- A-Z_)
        programs=${line#*|}
        words=
        for program in $(echo "${programs%|*}" | tr , ' '); do
            words="$words $(which "${program%:*}"):${program#*:}"
        done
        echo "\$(eval \$(call lg-machine-programs,$name,$words))"
    done
} > override.mk
for folder in "$here"/package/*; do
    name=${folder##*/}
    source=$(sed -n 's/^source: *\([^ ]*\).*/\1/p' "$folder/package.yaml")
    [ -n "$source" ] || continue
    say "$name: source"
    get "$source" "build/$name" || { cat build/log >&2; fail "$source: no version can be downloaded"; }
    skip=
    if grep -q '^patched: *false' "$folder/package.yaml"; then skip=--skip-patches; fi
    dpkg-source --no-check $skip --extract "build/$name"/*.dsc "sources/$name" > /dev/null
    # Of another version: Buildroot's patches that do not fit are not needed, or the compiler will say.
    for patch in "$buildroot/package/$name"/*.patch; do
        [ -f "$patch" ] || continue
        if patch -d "sources/$name" -p1 -f -s --dry-run < "$patch" > /dev/null 2>&1; then
            patch -d "sources/$name" -p1 -f -s --no-backup-if-mismatch < "$patch"
        fi
    done
    echo "$(echo "$name" | tr a-z- A-Z_)_OVERRIDE_SRCDIR = $out/sources/$name" >> override.mk
done
# The two headers that musl has not.
cp "$(gcc -E -x c -include sys/queue.h /dev/null | sed -n 's/^# 1 "\(.*queue\.h\)".*/\1/p' | head -n 1)" \
    "$buildroot/package/musl-compat-headers/cdefs.h" headers/
cat >> override.mk << C
MUSL_COMPAT_HEADERS_SITE = $out/headers
MUSL_COMPAT_HEADERS_SITE_METHOD = local
override MUSL_COMPAT_HEADERS_EXTRA_DOWNLOADS =
C
sum=$(sha256sum < "dl/$linux.tar.xz")
echo "sha256  ${sum%% *}  $linux.tar.xz" > patches/linux/linux.hash

fragment="\$(BR2_EXTERNAL_LG_PATH)/kernel/linux-$series.config"
if [ ! -f "$here/kernel/linux-$series.config" ]; then
    fragment=$out/linux.config
    echo "# Nothing is known of linux $series." > linux.config
fi
for file in "$here"/configs/*_defconfig; do
    {
        grep -vxFf "$here/buildroot/toolchain-internal.config" "$file" |
            grep -vxFf "$here/buildroot/linux-release.config" |
            sed "s,\"[^\"]*/kernel/linux-[0-9.]*\.config,\"$fragment,"
        cat "$here/buildroot/toolchain-external.config"
        cat << C
BR2_TOOLCHAIN_EXTERNAL_PATH="$out/toolchain"
BR2_TOOLCHAIN_EXTERNAL_GCC_${gcc%%.*}=y
BR2_TOOLCHAIN_EXTERNAL_HEADERS_$(echo "$series" | tr . _)=y
BR2_LINUX_KERNEL_CUSTOM_TARBALL=y
BR2_LINUX_KERNEL_CUSTOM_TARBALL_LOCATION="file://$out/dl/$linux.tar.xz"
BR2_GLOBAL_PATCH_DIR="$out/patches"
BR2_PACKAGE_OVERRIDE_FILE="$out/override.mk"
BR2_DL_DIR="$out/dl"
C
    } > "configs/${file##*/}"
done
printf 'name: LGD\ndesc: compiler and sources of the distribution, for LG\n' > external.desc
: > external.mk
: > Config.in
rm -rf build
cat << C
Done. Now:
  make -C $buildroot BR2_EXTERNAL=$here:$out O=/tmp/lean lean_defconfig && make -C /tmp/lean
C
