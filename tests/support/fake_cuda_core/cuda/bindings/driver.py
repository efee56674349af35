"""The one function that the checkpoint helper needs; an order for it gives the number of its error."""

from cuda.core.checkpoint import CUDAError, obey


def cuInit(flags: int) -> tuple[int]:
    try:
        obey("cuInit", 0, lambda: None)
    except CUDAError as error:
        return (int(str(error)),)
    return (0,)
