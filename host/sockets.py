"""Types of the host's sockets that its own nodes define.

Apart from the rest, because with those nodes come all libraries for video files: what computes with the host
and makes no nodes works without them.
"""

from comfy_extras.nodes_frame_interpolation import FrameInterpolationModel as InterpolationModel

__all__ = ["InterpolationModel"]
