"""Learning after deployment: sessions that read a stream, learn from it, and answer from what they have learned."""

from .consolidate import Consolidated as Consolidated
from .consolidate import consolidate as consolidate
from .consolidate import distil as distil
from .gates import Gate as Gate
from .gates import always as always
from .gates import budget as budget
from .gates import ema as ema
from .gates import never as never
from .gates import parse_gate as parse_gate
from .gates import threshold as threshold
from .keeping import from_run as from_run
from .keeping import open as open
from .pool import Owner as Owner
from .pool import Pool as Pool
from .report import LevelReport as LevelReport
from .report import Report as Report
from .session import Session as Session
from .stream import ChunkReport as ChunkReport
