"""The sandbox over HTTP, in Sandbox Fusion's protocol: both ends of the wire."""
