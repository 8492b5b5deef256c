#!/usr/bin/env bash
# Installs the system packages that a platform asks its images to have; without any it does nothing.
#
# Usage: [APT_MIRROR=http://host] bash docker/platform_packages.sh [PACKAGE ...]
#
#   APT_MIRROR   host that has /ubuntu and /debian; empty: the base image's own sources
set -euo pipefail

(($#)) || exit 0
if [[ -n ${APT_MIRROR:-} ]]; then
  shopt -s nullglob
  sed -Ei "s#https?://((archive|security|ports)\.ubuntu\.com|deb\.debian\.org|security\.debian\.org)/#${APT_MIRROR%/}/#" \
    /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources}
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/*
