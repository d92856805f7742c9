"""What a deployment needs beside prefect.yaml: the local stack and what a cluster takes."""
