#!/usr/bin/env bash
# Installs what the two-node tests need, where that is missing and can be had (root on Debian or Ubuntu). Without it
# those tests are skipped and say why, so this never fails. A service that a package brings is not started.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

missing=()
for pair in ip:iproute2 ssh:openssh-client sshd:openssh-server pdsh:pdsh; do
  command -v "${pair%%:*}" > /dev/null || missing+=("${pair##*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "tests/cluster: ${missing[*]} missing; not root on Debian, so the two-node tests will be skipped" >&2
  exit 0
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then # 101: the package's scripts may not start anything
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
echo "tests/cluster: installing ${missing[*]}"
get() { apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends "${missing[@]}" > /dev/null; }
get 2> /dev/null || { apt-get -qq update && get; } ||
  echo "tests/cluster: apt-get could not install ${missing[*]}; the two-node tests will be skipped" >&2
