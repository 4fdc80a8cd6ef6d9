#!/usr/bin/env bash
# Install the Debian packages that some tests need: brain templates, a remote shell, network namespaces, SLURM, PostgreSQL. If
# they cannot be installed (another system, not root, no network), print a message; these tests are then skipped.
set -u
packages=(mricron-data pdsh openssh-server iproute2 numactl
    slurm-wlm slurmctld slurmd slurm-client munge postgresql)
give_up() { printf 'test-packages: %s; the tests that need %s will be skipped\n' "$1" "${packages[*]}"; exit 0; }
command -v apt-get >/dev/null || give_up "no apt-get here"
[ "$(id -u)" = 0 ] || give_up "not root (sudo make test-packages)"
missing=()
for package in "${packages[@]}"; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
[ "${#missing[@]}" = 0 ] && exit 0
export DEBIAN_FRONTEND=noninteractive
# Do not start the services of the packages; the tests start what they need in their own namespaces.
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
apt-get update -qq >/dev/null 2>&1
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || give_up "apt-get could not install ${missing[*]}"
printf 'test-packages: installed %s\n' "${missing[*]}"
