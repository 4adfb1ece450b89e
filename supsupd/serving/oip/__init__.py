"""Open Inference Protocol v2: what REST and gRPC share."""
