#!/usr/bin/env bash
# Installs the browser that the page is tested in, where it is missing and can be had (root on Debian or Ubuntu).
# Without it those tests are skipped and say why, so this never fails. Playwright's own download is not used.
set -euo pipefail

! command -v chromium > /dev/null || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "tests/browser: chromium missing; not root on Debian, so the tests of the page will be skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
echo "tests/browser: installing chromium"
get() { apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends chromium fonts-dejavu-core > /dev/null; }
get 2> /dev/null || { apt-get -qq update && get; } ||
  echo "tests/browser: apt-get could not install chromium; the tests of the page will be skipped" >&2
