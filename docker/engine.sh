#!/usr/bin/env bash
# A Docker engine of its own, and stand-ins for the public base images, for machines without registry.
#
#   docker/engine.sh up          start dockerd, its data below $ENGINE (default ~/.cache/coco-trainer/engine);
#                                with ENGINE_MEMORY=9g in memory: a build writes each file of 7 GB once
#   docker/engine.sh base NAME   make NAME (such as python:3.11.14-slim-bookworm) with debootstrap and this
#                                machine's Python 3.11, where the registry that has it cannot be reached
#   docker/engine.sh serve       serve the wheels that pip finds on this disk to builds, on 127.0.0.1
#   docker/engine.sh down        stop both; images stay for the next time
#   docker/engine.sh clean       down, and remove everything, memory too
#
# Root, Linux, Debian's packages docker.io and debootstrap (docker/apt-engine.txt). It changes nothing outside
# $ENGINE: no iptables rules, no bridge but those of networks that one asks it for.
# DOCKER_HOST=unix://$ENGINE/docker.sock talks to it.
set -euo pipefail

ENGINE=${ENGINE:-$HOME/.cache/coco-trainer/engine}
export DOCKER_HOST=unix://$ENGINE/docker.sock DOCKER_BUILDKIT=1
DOCKER=/usr/bin/docker # Debian's: another client in PATH may lack its half of BuildKit
WHEELS_PORT=${WHEELS_PORT:-8765}

up() {
  mkdir -p "$ENGINE"
  $DOCKER version >/dev/null 2>&1 && return
  if [ -n "${ENGINE_MEMORY:-}" ] && ! mountpoint -q "$ENGINE"; then
    mount -t tmpfs -o "size=$ENGINE_MEMORY,mode=711" engine "$ENGINE"
  fi
  setsid dockerd --data-root "$ENGINE/data" --exec-root "$ENGINE/exec" --pidfile "$ENGINE/dockerd.pid" \
    --host "$DOCKER_HOST" --iptables=false --ip6tables=false --ip-forward=false --bridge=none \
    --storage-driver=overlay2 \
    >"$ENGINE/dockerd.log" 2>&1 </dev/null &
  for _ in $(seq 100); do
    $DOCKER version >/dev/null 2>&1 && return
    sleep 0.2
  done
  tail -n 3 "$ENGINE/dockerd.log" >&2
  return 1
}

base() {
  local name=$1 root=$ENGINE/rootfs context=$ENGINE/context
  $DOCKER image inspect "$name" >/dev/null 2>&1 && return
  # From the registry if there is one.
  timeout 20 "$DOCKER" pull --quiet "$name" >/dev/null 2>&1 && return
  if ! $DOCKER image inspect debian:stand-in >/dev/null 2>&1; then
    debian "$root"
    tar -C "$root" -c . | $DOCKER import - debian:stand-in >/dev/null
    rm -rf "$root"
  fi
  python_of_this_machine "$context"
  $DOCKER build --quiet --network=host -t "$name" "$context" >/dev/null
  rm -rf "$context"
}

debian() { # bookworm with this machine's certificates and package sources
  local root=$1 mirror
  mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/debian.sources)
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" "$mirror" >"$ENGINE/debootstrap.log"
  cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
  chroot "$root" update-ca-certificates >/dev/null 2>&1
  rm -f "$root/etc/apt/sources.list"
  cp /etc/apt/sources.list.d/debian.sources "$root/etc/apt/sources.list.d/"
  cp /etc/apt/apt.conf.d/99* "$root/etc/apt/apt.conf.d/" 2>/dev/null || true
  rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
}

python_of_this_machine() { # CPython in /usr/local as in the official image
  local context=$1 prefix library=lib/python3.11/site-packages
  prefix=$(python3.11 -c 'import sys; print(sys.base_prefix)')
  rm -rf "$context"
  mkdir -p "$context/python/$library"
  tar -C "$prefix" --exclude=site-packages --exclude=lib/python3.11/test --exclude='*.a' --exclude=__pycache__ \
    -c bin/python3.11 bin/pip3.11 include lib | tar -C "$context/python" -x
  cp -a "$prefix/$library"/{pip,pip-*.dist-info,setuptools,setuptools-*.dist-info,_distutils_hack,pkg_resources} \
    "$context/python/$library/"
  printf '%s\n' 'FROM debian:stand-in' \
    'RUN apt-get update && apt-get install -y --no-install-recommends libssl3 libffi8 libsqlite3-0 \' \
    '    libreadline8 libncursesw6 libbz2-1.0 liblzma5 zlib1g libuuid1 libgdbm6 libexpat1 netbase tzdata && \' \
    '    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/*' \
    'COPY python/ /usr/local/' \
    'RUN cd /usr/local/bin && sed -i "1s|^#!.*|#!/usr/local/bin/python3.11|" pip3.11 && \' \
    '    ln -s python3.11 python3 && ln -s python3.11 python && ln -s pip3.11 pip && ldconfig && \' \
    '    python -c "import ssl, sqlite3, bz2, lzma, ctypes, zlib, uuid"' \
    'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' \
    'CMD ["python3"]' >"$context/Dockerfile"
}

serve() { # writes $ENGINE/pip.conf, for `docker build --secret id=pip,src=...`
  local line addresses=''
  for line in $(pip config get global.extra-index-url 2>/dev/null); do
    case $line in file://*)
      addresses+=" http://127.0.0.1:$WHEELS_PORT${line#file://}" ;;
    esac
  done
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntimeout = 180\n' >"$ENGINE/pip.conf"
  [ -n "$addresses" ] || return 0
  printf 'extra-index-url =%s\n' "$addresses" >>"$ENGINE/pip.conf"
  [ -s "$ENGINE/wheels.pid" ] && kill -0 "$(cat "$ENGINE/wheels.pid")" 2>/dev/null && return
  # Folders of wheels lie below /opt by habit; nothing above is served.
  mkdir -p "$ENGINE/www"
  ln -sfn /opt "$ENGINE/www/opt"
  setsid python3 -m http.server --bind 127.0.0.1 --directory "$ENGINE/www" "$WHEELS_PORT" \
    >"$ENGINE/wheels.log" 2>&1 </dev/null &
  echo $! >"$ENGINE/wheels.pid"
}

down() {
  local name
  for name in dockerd wheels; do
    [ -s "$ENGINE/$name.pid" ] && kill "$(cat "$ENGINE/$name.pid")" 2>/dev/null || true
  done
  for _ in $(seq 50); do
    [ -e "$ENGINE/dockerd.pid" ] || break
    sleep 0.2
  done
  rm -f "$ENGINE/wheels.pid"
  umount "$ENGINE/exec/netns/default" 2>/dev/null || true
}

case "${1:-}" in
up | serve | down) "$1" ;;
base) base "${2:?name of the image}" ;;
clean)
  down
  if mountpoint -q "$ENGINE"; then umount "$ENGINE"; fi
  rm -rf "$ENGINE"
  ;;
*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
