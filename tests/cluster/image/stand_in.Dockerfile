# A stand-in for rayproject/ray, for machines that reach Debian's packages and a package index but no registry of images:
# its user, folders, PATH and old packages, on Debian's Python. `build.sh` makes it, gives it the name of what it stands in
# for, and says what else. No compiler: the base for CPUs has none either.
FROM scratch
ADD rootfs.tar /

ENV TZ=America/Los_Angeles LC_ALL=C.UTF-8 LANG=C.UTF-8 PATH=/home/ray/anaconda3/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN useradd -ms /bin/bash -d /home/ray ray --uid 1000 --gid 100 \
    && echo 'ray ALL=NOPASSWD: ALL' >> /etc/sudoers
USER 1000
ENV HOME=/home/ray
WORKDIR /home/ray
# Older than what the lock wants, as in the base: the build has to replace them.
RUN python3 -m venv anaconda3 \
    && pip install --no-cache-dir --quiet setuptools==80.9.0 wheel numpy==1.26.4 fsspec==2023.12.1 protobuf==6.33.1 \
        psutil==5.9.6 urllib3==1.26.19 cryptography==43.0.3 "ray[default]==2.60.0"
