#!/usr/bin/env bash
# Builds cluster/Dockerfile with buildah where no registry of images can be reached, on a stand-in for its base.
# By hand, as root, with Debian's buildah and mmdebstrap, and room for about three images below WORK:
#
#   MOUNTS="/etc/ssl/certs PIP_CONF" tests/cluster/image/build.sh WORK [--build-arg LOCK=...]
#
# MOUNTS are files and folders of this machine, SOURCE or SOURCE:TARGET, that the network asks for: they are there while
# it builds and not in the image; PIP_CONF stands for your pip configuration. Besides the image it leaves WORK/run, which runs a command in it.
set -euo pipefail
cd "$(dirname "$0")/../../.."
work=$(realpath -m "$1")
shift
image=localhost/cert-ray:stand-in
base=docker.io/rayproject/ray:$(sed -n 's/^ARG BASE=//p' cluster/Dockerfile)
mkdir -p "$work/base" "$work/tmp"
export TMPDIR=$work/tmp

store=(--root "$work/storage" --runroot "$work/runroot" --storage-driver overlay)
mounts=()
for mount in ${MOUNTS:-}; do
    [[ $mount == *:* ]] || mount=$mount:$mount
    mounts+=(--volume "$mount:ro")
done
build=(buildah "${store[@]}" build --isolation chroot --pull=never --layers "${mounts[@]}")

if [[ ! -e $work/base/rootfs.tar ]]; then
    # What the base has of Ubuntu's packages, by their Debian names.
    mmdebstrap --variant=minbase bookworm "$work/base/rootfs.tar" --include="ca-certificates,python3,python3-venv,sudo,\
tzdata,git,wget,libjemalloc-dev,tmux,screen,rsync,netbase,openssh-client,gnupg,socat"
fi
"${build[@]}" --file tests/cluster/image/stand_in.Dockerfile --tag "$base" "$work/base"
"${build[@]}" --file cluster/Dockerfile --ignorefile cluster/Dockerfile.dockerignore --tag "$image" "$@" .

cat > "$work/run" <<END
#!/usr/bin/env bash
# A command in the image, as its user: $work/run COMMAND... OPTIONS="--volume A:B" and ISOLATION=oci are buildah's.
set -euo pipefail
export TMPDIR=$work/tmp
store=(${store[*]@Q})
container=\$(buildah "\${store[@]}" from --pull=never $image)
trap 'buildah "\${store[@]}" rm "\$container" > /dev/null' EXIT
buildah "\${store[@]}" run --isolation "\${ISOLATION:-chroot}" \${OPTIONS:-} "\$container" -- "\$@"
END
chmod +x "$work/run"
buildah "${store[@]}" images
