"""The socket: Open Inference Protocol and the native API over HTTP."""
