"""An RTSP server for tests, `/usr/bin/python3 rtsp_server.py PORT [CERTIFICATE]`; a moving image, 320x240, 15 fps.

With a certificate it speaks TLS and asks for user `guard` and password `secret`.

Needs the system's Python with GStreamer: apt packages python3-gi, gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-base
and gstreamer1.0-plugins-good. Prints the port when it listens; exits with 77 where a part is missing.
"""

import sys


def main() -> None:
    try:
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstRtspServer", "1.0")
        from gi.repository import Gio, GLib, Gst, GstRtspServer
    except (ImportError, ValueError):
        sys.exit(77)
    Gst.init(None)
    if not all(Gst.ElementFactory.find(name) for name in ("videotestsrc", "jpegenc", "rtpjpegpay")):
        sys.exit(77)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(sys.argv[1])

    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(
        "( videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width=320,height=240,framerate=15/1 "
        "! jpegenc ! rtpjpegpay name=pay0 )"
    )
    factory.set_shared(True)
    if len(sys.argv) > 2:
        access = GstRtspServer.RTSPAuth()
        access.set_tls_certificate(Gio.TlsCertificate.new_from_file(sys.argv[2]))
        guard = GstRtspServer.RTSPToken()
        guard.set_string("media.factory.role", "guard")
        access.add_basic(GstRtspServer.RTSPAuth.make_basic("guard", "secret"), guard)
        server.set_auth(access)
        allowed = "guard,media.factory.access=(boolean)true,media.factory.construct=(boolean)true"
        factory.add_role_from_structure(Gst.Structure.from_string(allowed)[0])
    server.get_mount_points().add_factory("/ball", factory)
    if not server.attach(None):
        sys.exit(1)
    print(server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


main()
