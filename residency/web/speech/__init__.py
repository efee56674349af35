"""Speech requests: uploads, conversion, queue, engine calls and result files."""
