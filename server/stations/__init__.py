"""Stations of a fleet: other ComfyUIs, one job at a time each, that take jobs from this one's queue.

    ComfyUI with the job API  --pipe-->  driver of Ray  -->  stations, each with a ComfyUI of its machine

`link` is the side of the API's process, `driver` that of the driver's; `station` is what Ray starts on a
machine, and `about` what a station's ComfyUI says of itself. Ray is imported in the driver's process only.
"""
