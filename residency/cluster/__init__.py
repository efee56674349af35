"""The engine on other machines: replicas on Ray Serve, and the engine's interface in front of them."""
