"""`python -m cert_ray` is `cert-ray`."""

from cert_ray.cli import main

main()
