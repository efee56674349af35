from __future__ import annotations


class CudaPlatform:
    def is_sleep_mode_available(self) -> bool:
        return True


current_platform = CudaPlatform()
