"""moto's S3 server, in a thread of the test's process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start the server without buckets; yield the environment of a client, as on a cluster."""
    import s3fs
    from moto.moto_api._internal.models import moto_api_backend
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto_api_backend.reset()  # the buckets are the process's, whichever server made them
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
