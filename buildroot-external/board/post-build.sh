#!/bin/sh
# post-build.sh TARGET [FOLDER...]: leaves in the root file system what the guest runs, and nothing that only a
# distribution has. Users, configuration and devices come with the overlays: xtask lays them on later; a build by hand
# names their folders, relative to this one.
set -eu
here=$(cd "${0%/*}" && pwd)
cd "$1"
shift
# The shell finds all applets by itself; programs look for this one.
find . -type l | while read -r link; do
    case $link:$(readlink "$link") in
    ./bin/sh:*) ;;
    *:busybox | *:*/busybox) rm "$link" ;;
    esac
done
rm -rf lib32 usr/lib32 etc/ethertypes etc/hostname etc/init.d etc/issue etc/logrotate.d etc/network etc/nginx \
    etc/os-release etc/shells etc/xtables.conf usr/html usr/lib/os-release usr/share/bash-completion \
    usr/share/metainfo usr/share/xtables
# One name for each of iptables' tools, and no scripts around them.
for name in iptables-apply iptables-legacy iptables-legacy-restore iptables-legacy-save; do
    rm -f "usr/sbin/$name" "usr/sbin/ip6${name#ip}"
done
rm -f usr/bin/iptables-xml
# What programs open or write without asking the configuration.
mkdir -p var/log/nginx run tmp
# Buildroot writes to etc and usr/lib when it comes here again.
find . -mindepth 1 -depth -type d -empty ! -path ./etc ! -path ./lib ! -path ./usr/lib ! -path ./run ! -path ./tmp \
    ! -path ./var/log/nginx -exec rmdir {} +
# The same bytes wherever it is built.
if [ -n "${BASE_DIR-}" ] && leaks=$(grep -rlF "$BASE_DIR/" .); then
    echo "error: these files hold the path of the build folder, $BASE_DIR:" $leaks >&2
    exit 1
fi
for folder; do
    cp -R "$here/$folder/." .
done
