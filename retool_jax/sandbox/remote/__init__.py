"""The sandbox over HTTP, in Sandbox Fusion's protocol: server and client."""
