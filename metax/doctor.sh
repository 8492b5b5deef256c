#!/usr/bin/env bash
# Looks whether this machine can run the kit, and says what to do: packages, devices, memory, limits.
# 检查本机能否运行本套件，并说明如何解决：软件包、设备、内存、限制。
# Flags after --: --json prints objects; --no-device is for the build of an image / -- 之后可用的参数
# Not run on hardware / 未在硬件上运行
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/doctor.sh
source "$VENDOR/../common/shell/doctor.sh" "$@"
