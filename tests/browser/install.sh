#!/usr/bin/env bash
# Debian's Chromium, for tests/browser/test_report.py, where it is missing and may be installed.  Without it those tests
# are skipped, but for CI, where that is a failure.
set -uo pipefail
command -v chromium >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0
echo "installing chromium, for the tests of the report in a real browser" >&2
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 ||
    echo "it could not be installed" >&2
exit 0
