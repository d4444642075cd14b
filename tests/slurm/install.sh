#!/usr/bin/env bash
# Debian's SLURM and munge, for tests/slurm, where they are missing and may be installed.  Without them those tests are
# skipped, but for CI, where that is a failure.
set -uo pipefail
PATH=$PATH:/usr/sbin
have() { command -v slurmctld && command -v munged && command -v faketime && command -v strace; } >/dev/null
have && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0
echo "installing slurm-wlm, munge, strace and faketime, for the tests on a real SLURM" >&2
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge strace faketime; } >/dev/null 2>&1 ||
    echo "they could not be installed" >&2
exit 0
