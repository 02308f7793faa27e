"""Recordings as their decoders see them: where a file's sound lies, and reading it from any sample on.

    with Recording(path) as recording:
        for block in recording.blocks(start):   # (n, C) float32, until the recording ends
            ...

libsndfile decodes, but it seeks exactly only in uncompressed files and in FLAC. In mp3 and Ogg it goes by
guesses: of an mp3 without a Xing frame it reads what the first frame's bit rate lets it expect, of joined Ogg
files the first. So the frames of an mp3 and the pages of an Ogg file are looked up here, and libsndfile is
given a file that has nothing but the sound and begins shortly before the sample that is wanted:

    tag | frame 0 | ... | frame 995 | frame 996 | ... | frame 1000 | ...     the file
                        | frame 992 | frame 996 | ... | frame 1000 | ...     given to libsndfile
                          decoded, thrown away        | wanted

What comes of an mp3 frame depends on up to 511 bytes of the frames before it (the bit reservoir) and on the
state that the two before leave behind, what comes of a Vorbis packet on the packet before. Decoded from
there, all samples are the very ones that decoding from the beginning gives.
"""
import array
import bisect
import functools
import io
import mmap
import os
import re
import struct
import zlib
from typing import NamedTuple

import numpy as np
import soundfile

EXACT = ("ALAC_16", "FLOAT", "DOUBLE", "ULAW", "ALAW")     # beside PCM: libsndfile seeks exactly in them
UNKNOWN = 2 ** 62       # samples: a length beyond is none
BLOCK = 2 ** 18         # numbers read at a time
HEAD = 2 ** 16          # bytes in which the headers of a file are looked for
END = 39                # libsndfile's error at the end of a FLAC file that does not say how long it is
STREAMED = (0x7fffe000, 0x7ffff000, 0xffffe000)     # sizes of about this say that it was not known
VORBIS_BLOCKS = 2 ** 14     # samples, of the two longest blocks that there are
NO_MUSIC = 4096         # bytes between the frames of an mp3 that are let pass without a word


class Spliced(io.RawIOBase):
    """A file made of parts: bytes, or (begin, end) of the file at path. It may claim to be longer."""

    def __init__(self, path, parts: list, claimed=None):
        self.file, self.parts, self.at = open(path, "rb"), parts, 0
        self.ends = list(np.cumsum([len(p) if isinstance(p, bytes) else p[1] - p[0] for p in parts]))
        self.size = claimed or int(self.ends[-1])

    def __repr__(self):     # in libsndfile's errors
        return repr(os.fspath(self.file.name))

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self):
        return self.at

    def readinto(self, buffer):
        done = 0
        if self.ends[-1] < self.size - 128 <= self.at:
            # libsndfile looks for a tag at the end, and gives up where it cannot read so many bytes
            done = min(len(buffer), self.size - self.at)
            buffer[:done] = bytes(done)
            self.at += done
        while done < len(buffer) and (n := bisect.bisect_right(self.ends, self.at)) < len(self.parts):
            part, left = self.parts[n], int(self.ends[n]) - self.at
            take = min(left, len(buffer) - done)
            if isinstance(part, bytes):
                data = part[len(part) - left:][:take]
            else:
                self.file.seek(part[1] - left)
                data = self.file.read(take)
            if not data:
                break
            buffer[done:done + len(data)] = data
            done, self.at = done + len(data), self.at + len(data)
        return done

    def close(self):
        self.file.close()
        super().close()


class Decoder(soundfile.SoundFile):
    """A SoundFile that only goes forward by itself: after each block soundfile would seek to where it is."""

    def __init__(self, file):
        self.file = file
        try:
            super().__init__(file)
        except soundfile.LibsndfileError:
            self.close_file()
            raise

    def seekable(self):
        return False

    def close(self):
        super().close()
        self.close_file()

    def close_file(self):
        if isinstance(self.file, Spliced):
            self.file.close()


# --- mp3 --------------------------------------------------------------------------------------------------

BITRATES = {    # kbit/s of (MPEG-1, layer), and of MPEG-2 and 2.5
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
LIKE = 0xfffe0c00       # bits of a header that all frames of a recording have alike; so is mono or not
DECODER_DELAY = 529     # samples, of any mp3 decoder
MAYBE = re.compile(rb"\xff[\xe0-\xff]|ID3|APETAGEX|TAG")     # what a frame or a tag begins with


@functools.lru_cache(4096)
def frame_of(header: int) -> tuple[int, int, int, int, int] | None:
    """Header of a frame, 32 bits -> (bytes, samples, kind, offset of a Xing tag, bits of the reservoir).

    The last two, the second being how many bits say where a frame's data begin in the reservoir, are 0 in
    layers I and II, which have neither. None if it is no header.
    """
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    bitrate, rate = header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7ff or version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    first = version == 3    # MPEG-1
    rate = (44100, 48000, 32000)[rate] >> (0 if first else 1 if version == 2 else 2)
    mono, padding = header >> 6 & 3 == 3, header >> 9 & 1
    bits = 1000 * BITRATES[first, layer][bitrate - 1]
    kind = header & LIKE | mono
    if layer == 1:
        return 4 * (12 * bits // rate + padding), 384, kind, 0, 0
    samples = 576 if layer == 3 and not first else 1152
    size = samples // 8 * bits // rate + padding
    if layer == 2:
        return size, samples, kind, 0, 0
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return size, samples, kind, 4 + side, 9 if first else 8


def after_tag(data, at: int) -> int:
    """Where the ID3 or APE tag that begins at `at` ends; `at` itself if there is none."""
    if data[at:at + 3] == b"ID3" and at + 10 <= len(data):
        a, b, c, d = data[at + 6:at + 10]
        return at + 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if data[at + 5] & 16 else 0)
    if data[at:at + 8] == b"APETAGEX" and at + 24 <= len(data):
        size, _, flags = struct.unpack("<III", data[at + 12:at + 24])
        return at + (32 if not flags & 1 << 29 else size + 32)     # a footer, or a header with all behind
    return at + 128 if data[at:at + 3] == b"TAG" else at


class Mp3:
    """The frames of an mp3 file: their places, and which of their samples are sound."""

    def __init__(self, data):
        self.starts, self.sizes = array.array("q"), array.array("q")
        self.kind, self.tags = None, []
        self.lost = 0           # bytes between frames, or behind them, that are no tags
        self.cut = False        # in the middle of its last frame
        self.scan(data)
        self.starts, self.sizes = np.array(self.starts), np.array(self.sizes)
        n = len(self.starts)
        self.delay, self.frames = 0, n * self.samples if n else 0
        claimed = sum(xing.count for xing in self.tags) * self.samples if n else 0
        self.missing = claimed - self.frames if claimed > self.frames else 0
        if self.tags and self.tags[0].first and self.tags[0].delay is not None:
            self.delay = self.tags[0].delay + DECODER_DELAY     # that of the encoder, and ours
            padding = max(0, self.tags[-1].padding - DECODER_DELAY) if claimed == self.frames else 0
            self.frames = max(0, self.frames - self.delay - padding)

    def header(self, data, at: int):
        """What frame_of says of the place, if it is a frame of this file's kind."""
        frame = frame_of(int.from_bytes(data[at:at + 4], "big")) if at + 4 <= len(data) else None
        return frame if frame and self.kind in (None, frame[2]) else None

    def scan(self, data):
        at, follows = 0, False      # follows: whether a frame ends here
        while at + 4 <= len(data):
            frame = self.header(data, at)
            if frame and at + frame[0] <= len(data) and (follows or self.confirmed(data, at, frame)):
                self.add(data, at, frame)
                at, follows = at + frame[0], True
                continue
            if frame and follows:
                self.cut = True
                break
            follows, end = False, after_tag(data, at)
            if end == at:
                found = MAYBE.search(data, at + 1)
                end = found.start() if found else len(data)
                self.lost += end - at if self.starts else 0
            at = end

    def confirmed(self, data, at, frame) -> bool:
        """Whether another frame of the kind begins where this one ends, or the file ends there."""
        following = frame_of(int.from_bytes(data[at + frame[0]:at + frame[0] + 4], "big"))
        return at + frame[0] == len(data) or following is not None and following[2] == frame[2]

    def add(self, data, at: int, frame):
        size, self.samples, self.kind, self.offset, self.bits = frame
        offset = self.offset
        tag = data[at + offset:at + offset + 4] if offset else b""
        if tag in (b"Xing", b"Info"):
            self.tags.append(read_xing(data[at + offset:at + size], not self.starts))
        elif data[at + 36:at + 40] != b"VBRI":
            self.starts.append(at)
            self.sizes.append(size)

    def before(self, sample: int) -> tuple[int, int]:
        """For the sound from `sample` on: the first frame to give to libsndfile, the first to be decoded."""
        decoded = max(0, (sample + self.delay) // self.samples - 2)
        n, reservoir = decoded, 0
        while n > 0 and reservoir < 511:
            n -= 1
            reservoir += int(self.sizes[n]) - 38        # header, checksum and side information are not of it
        return (n, decoded) if n else (0, 0)

    def muted(self, path, n: int, end: int) -> list:
        """Frames n ... end - 1 as parts of a file: what later frames need of them, but no sound.

        Of the side information only the place in the reservoir is left: the lengths of all data are 0.
        """
        parts = []
        with open(path, "rb") as file:
            for start, size in zip(self.starts[n:end].tolist(), self.sizes[n:end].tolist()):
                file.seek(start)
                frame = bytearray(file.read(size))
                side = 4 if frame[1] & 1 else 6         # behind the header, and a checksum
                frame[side + 1] &= 0x80 if self.bits == 9 else 0
                frame[side + 2:self.offset + side - 4] = bytes(self.offset - 6)
                parts.append(bytes(frame))
        return parts

    def parts(self, n: int, end=None) -> list[tuple[int, int]]:
        """Places of the frames from n on, those that follow each other in one."""
        starts = self.starts[n:end]
        if not len(starts):
            return []
        ends = starts + self.sizes[n:end]
        gaps = np.flatnonzero(starts[1:] != ends[:-1])
        begins, stops = starts[np.r_[0, gaps + 1]], ends[np.r_[gaps, len(ends) - 1]]
        return list(zip(begins.tolist(), stops.tolist()))

    def open(self, path, link: int, start: int):
        n, decoded = self.before(start)
        first = [(int(self.starts[n]), int(self.starts[n] + self.sizes[n]))] if len(self.starts) else []
        muted = self.muted(path, n, decoded) if self.offset else self.parts(n, decoded)
        # the buffer of the filter bank turns once in four frames: so sums are rounded in the same order
        copies = (n + self.delay // self.samples) % 4
        parts = copies * (muted[:1] or first) + muted + self.parts(decoded)
        skip = start + self.delay - (n - copies) * self.samples
        size = int(self.sizes.sum())
        # from bytes and the first frame's bit rate libsndfile takes the length: let that be long enough
        return Decoder(Spliced(path, parts, 64 * size + 2 ** 16)), skip

    @property
    def lengths(self) -> list[int]:
        return [self.frames]

    def problem(self, rate: int) -> str | None:
        if self.missing:
            return f"that is {self.missing / rate:.2f} s less than it claims"
        if self.lost > NO_MUSIC:
            return f"{self.lost} bytes between its frames, or behind them, are no mp3 of its kind"
        if self.cut:
            return "its last frame is cut off"
        return None


class Xing(NamedTuple):
    """What the tag in an mp3 frame without sound says of the frames that follow."""
    count: int              # how many there are
    delay: int | None       # samples that the encoder put in front, None if it does not say
    padding: int            # and behind
    first: bool             # whether no frame comes before it


def read_xing(tag: bytes, first: bool) -> Xing:
    if len(tag) < 12:
        return Xing(0, None, 0, first)
    flags, count = struct.unpack(">II", tag[4:12])
    at = 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    both = int.from_bytes(tag[at + 21:at + 24], "big")
    if not flags & 1:
        return Xing(0, None, 0, first)
    if not tag[at:at + 4].isalnum() or len(tag) < at + 24:
        return Xing(count, None, 0, first)
    return Xing(count, both >> 12, both & 0xfff, first)


# --- Ogg --------------------------------------------------------------------------------------------------

class Link(NamedTuple):
    """One of the Ogg files that a file is joined of."""
    begin: int
    sound: int          # where the pages with sound begin, behind those of the headers
    end: int
    pages: np.ndarray   # (n, 2): place and granule of the pages where decoding can begin
    complete: bool      # whether its last page says that it is the last
    count: int          # pages, those that are lost as well
    lost: int           # pages that are damaged or not there


class Ogg:
    """The pages of an Ogg file, Vorbis or Opus or another coding."""

    def __init__(self, data, path):
        links = split_links(data)
        self.like, self.lengths = lengths_of(path, [(link.begin, link.end) for link in links])
        self.links = links[:len(self.lengths)]
        self.other_kinds = len(links) - len(self.links)

    def open(self, path, n: int, start: int):
        link, length = self.links[n], self.lengths[n]
        rate, _, coding = self.like
        if coding == "OPUS" and start > 2 * rate:   # libsndfile seeks well, but for the rounding at first
            file = Decoder(Spliced(path, [(link.begin, link.end)]))
            file.seek(start - 2 * rate)
            return file, 2 * rate
        page = 0
        if coding == "VORBIS" and len(link.pages):
            granule = link.pages[-1, 1] - (length - start + VORBIS_BLOCKS)
            page = int(np.searchsorted(link.pages[:, 1], granule)) - 1
        if page > 0:
            file = Decoder(Spliced(path, [(link.begin, link.sound), (int(link.pages[page, 0]), link.end)]))
            if start >= length - file.frames:       # libsndfile counts from the end here, which is right
                return file, start - (length - file.frames)
            file.close()
        return Decoder(Spliced(path, [(link.begin, link.end)])), start

    def problem(self, rate: int) -> str | None:
        if self.other_kinds:
            return other_kinds(self.other_kinds)
        lost, count = sum(link.lost for link in self.links), sum(link.count for link in self.links)
        if lost:
            about = sum(self.lengths) / rate * lost / count
            return f"{lost} of its {count} pages are damaged or missing, about {about:.2f} s"
        if not self.links[-1].complete:
            return "its last page is missing"
        return None


REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def is_intact(page: bytes) -> bool:
    """Whether the checksum of a page is right: a CRC-32 as that of zlib, with the bits in the other order."""
    bits = (page[:22] + bytes(4) + page[26:]).translate(REVERSED)
    checksum = zlib.crc32(bits, 2 ** 32 - 1) ^ 2 ** 32 - 1
    return int(f"{checksum:032b}"[::-1], 2) == int.from_bytes(page[22:26], "little")


def split_links(data) -> list[Link]:
    """The links of an Ogg file. Pages that are damaged are passed over."""
    links, at, previous = [], data.find(b"OggS"), None
    while at >= 0 and at + 27 <= len(data):
        flags, granule, _, number = struct.unpack("<BqII", data[at + 5:at + 22])
        count = data[at + 26]
        lacing = data[at + 27:at + 27 + count]
        end = at + 27 + count + sum(lacing)
        if end > len(data):
            break
        intact = is_intact(data[at:end])        # else whoever decodes passes it over
        if flags & 2 and not (previous is not None and previous & 2):   # the first page of a stream
            head = data[at + 27 + count:at + 35 + count]
            packets = 3 if head[:7] == b"\1vorbis" else 2 if head == b"OpusHead" else None
            links.append(dict(begin=at, sound=end, pages=[], packets=packets, streams=0, lost=0, count=0,
                              next=0))
        if links:
            link = links[-1]
            link["streams"] += bool(flags & 2)
            if intact and link["pages"] and link["streams"] == 1:   # radio has any number behind the headers
                gap = max(0, number - link["next"])
                link["lost"] += gap
                link["count"] += gap
            link["lost"] += not intact
            link["count"] += 1
            link["next"] = number + 1 if intact else link["next"] + 1
            if link["packets"] is not None and link["packets"] > 0:     # of the headers
                link["packets"] -= sum(length < 255 for length in lacing)
                link["sound"] = end
            elif granule >= 0 and not flags & 1:
                link["pages"].append((at, granule))
            link |= dict(end=end, last=granule, complete=bool(flags & 4))
            previous = flags
        at = end if data[end:end + 4] == b"OggS" else data.find(b"OggS", end)
    found = []
    for link in links:
        seekable = link["packets"] is not None and link["streams"] == 1
        pages = np.array(link["pages"] if seekable else [], np.int64).reshape(-1, 2)
        found.append(Link(link["begin"], link["sound"], link["end"], pages, link["complete"],
                          link["count"], link["lost"]))
    return found


# --- files joined of several ------------------------------------------------------------------------------

def lengths_of(path, places: list[tuple[int, int]]) -> tuple[tuple, list[int]]:
    """(rate, channels, coding) and lengths of the files that one is joined of, as far as they are alike."""
    like, lengths = None, []
    for place in places:
        try:
            with Decoder(Spliced(path, [place])) as file:
                kind, frames = (file.samplerate, file.channels, file.subtype), file.frames
        except soundfile.LibsndfileError:   # a video, say, or damaged
            break
        if like not in (None, kind):
            break
        like = kind
        lengths.append(frames)
    return like, lengths


def other_kinds(n: int) -> str:
    return f"{n} of the files that it is joined of are of another kind"


class Waves:
    """WAV files, one behind the other."""

    def __init__(self, path, places: list[tuple[int, int]]):
        like, self.lengths = lengths_of(path, places)
        self.links = [Plain(seeks_exactly(like[2]), [place]) for place in places[:len(self.lengths)]]
        self.other_kinds = len(places) - len(self.links)
        with self.links[-1].open(path, 0, 0)[0] as file:
            self.claim = claim_of(file.extra_info)

    def open(self, path, n: int, start: int):
        return self.links[n].open(path, 0, start)

    def problem(self, rate: int) -> str | None:
        return other_kinds(self.other_kinds) if self.other_kinds else self.claim


def places_of_waves(path, size: int) -> list[tuple[int, int]]:
    """Where the WAV files are that a file is joined of; what is behind them and no WAV file is left out."""
    places, at = [], 0
    with open(path, "rb") as file:
        while at + 44 < size:
            file.seek(at)
            name, length, kind = struct.unpack("<4sI4s", file.read(12))
            if (name, kind) != (b"RIFF", b"WAVE"):
                break
            end = min(at + 8 + length + length % 2, size)
            places.append((at, end))
            at = end
    return places


# --- all others -------------------------------------------------------------------------------------------

class Plain:
    """A file that libsndfile reads rightly, at times after its header has been put right: then in parts."""

    def __init__(self, exact: bool, parts=None, claim=None):
        self.exact, self.parts, self.claim = exact, parts, claim    # exact: whether libsndfile seeks exactly
        self.flac = None        # the path, if it is one

    def open(self, path, link: int, start: int):
        file = Decoder(Spliced(path, self.parts) if self.parts else os.fsencode(path))
        if self.exact and start:
            try:
                file.seek(start)
                return file, 0
            except soundfile.LibsndfileError:   # damaged on the way: what is before that can be read
                file.close()
                return self.open(path, link, 0)[0], start
        return file, start

    def problem(self, rate: int) -> str | None:
        if self.flac and not self.claim:
            with mapped(self.flac) as data:
                marker = b"fLaC\0\0\0\x22"     # the first one may have tags before it
                if data.find(marker, data.find(marker) + 1) > 0:
                    return "another FLAC file is joined to it, which is left out"
        return self.claim


def seeks_exactly(coding: str) -> bool:
    return coding.startswith("PCM") or coding in EXACT


def empty_chunk(head: bytes, size: int) -> int | None:
    """Where the size of the samples of a WAV file is, if it is 0 though samples follow."""
    at, place = 12, None
    while at + 8 <= len(head):
        name, length = struct.unpack("<4sI", head[at:at + 8])
        if name == b"data" and not length and at + 8 < size:
            place = at + 4
        at += 8 + length + length % 2
    return None if at == size else place    # whole chunks to the end: there are no samples


# --- reading ----------------------------------------------------------------------------------------------

@functools.lru_cache(64)
def source_of(path, size: int, time: int):
    """(source, rate, channels) of a file; size and time show when it has changed."""
    waves = places_of_waves(path, size)
    try:
        with Decoder(Spliced(path, waves[:1]) if len(waves) > 1 else os.fsencode(path)) as file:
            source = Waves(path, waves) if len(waves) > 1 else structure_of(file, path, size)
    except soundfile.LibsndfileError:
        source = repaired(path, size)
        if source is None:
            raise
    with source.open(path, 0, 0)[0] as file:
        if isinstance(source, Plain):
            source.lengths = [file.frames]
        return source, file.samplerate, file.channels


def structure_of(file, path, size: int):
    """The source for a file that libsndfile opens."""
    if file.format == "MP3":
        with mapped(path) as data:
            source = Mp3(data)
        if len(source.starts) and (source.tags or source.lost < source.sizes.sum()):
            return source       # else it is in "free format", say
    if file.format == "OGG":
        with mapped(path) as data:
            source = Ogg(data, path)
        if source.links:
            return source
    exact = soundfile.SoundFile.seekable(file) and seeks_exactly(file.subtype)
    source = Plain(exact, claim=claim_of(file.extra_info))
    source.flac = path if file.format == "FLAC" else None
    head = head_of(path)
    if file.format in ("WAV", "WAVEX") and not file.frames and (at := empty_chunk(head, size)):
        # written while it was recorded, and never finished: of the largest size it lasts as long as it is
        source.parts = [head[:at], b"\xff" * 4, (at + 4, size)]
    if head[:4] == b"RIFF" and size - int.from_bytes(head[4:8], "little") >= 2 ** 32 - HEAD:
        source.claim = "its header has no room for more than 4 GB, and the rest is left out; save it as flac"
    return source


def repaired(path, size: int):
    """The source for a file that libsndfile does not open, None if there is no help."""
    head = head_of(path)
    claimed = int.from_bytes(head[4:8], "little") + 8
    if head[:4] == b"RIFF" and 44 < claimed < size:
        return Plain(False, [(0, claimed)], f"{size - claimed} bytes behind the end of its wave are left out")
    if head[:4] == b"caff" and (at := head.find(b"data", 8)) > 0:
        left = struct.pack(">q", size - at - 12)
        return Plain(False, [head[:at + 4], left, (at + 12, size)], "its end is cut off")
    if not size:
        return None
    with mapped(path) as data:
        source = Mp3(data)
    return source if len(source.starts) > 8 and not source.lost else None


def mapped(path):
    """The bytes of a file, read from the disk only where they are looked at."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def head_of(path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def claim_of(log: str) -> str | None:
    """What libsndfile's log of a header says of sound that is missing."""
    for claimed, there in re.findall(r": (\d+) \(should be (\d+)\)", log):
        streamed = any(low <= int(claimed) < low + 2 ** 13 for low in STREAMED)
        if int(claimed) > int(there) and not streamed:
            return f"it has {there} of the {claimed} bytes that its header claims"
    return "its end is cut off" if "Seems to be a truncated file" in log else None


class Recording:
    """A file of sound: rate in Hz, channels, frames (samples, as far as its structure tells)."""

    def __init__(self, path):
        self.path, stat = path, os.stat(path)
        self.source, self.rate, self.channels = source_of(path, stat.st_size, stat.st_mtime_ns)
        self.frames = sum(self.source.lengths)
        self.problem = None     # what was wrong, once the end has been reached: sample `end`

    def blocks(self, start: int = 0):
        """Yields blocks (n, C), float32, from sample `start` on to the end, of 2 ** 18 numbers at most."""
        self.problem, self.end, at = None, start, 0
        for n, length in enumerate(self.source.lengths):
            if start < at + length:
                file, skip = self.source.open(self.path, n, max(0, start - at))
                with file:
                    begin = max(start, at)
                    for block in self.read(file, skip, at + length - begin):
                        begin += len(block)
                        self.end = begin
                        yield block
                if begin < at + length < UNKNOWN and not self.problem:
                    self.problem = f"that is {(self.frames - begin) / self.rate:.2f} s less than it claims"
                if self.problem:
                    break
            at += length
        self.problem = self.problem or self.source.problem(self.rate)

    def read(self, file, skip: int, left: int):
        size = BLOCK // self.channels
        while skip + left > 0:
            block = np.full((min(size, skip or left), self.channels), np.nan, np.float32)
            n, error = len(block), None
            try:
                n = len(file.read(out=block))
            except soundfile.LibsndfileError as failure:    # what was decoded before is in the block
                error, missing = failure, np.isnan(block[:, 0])
                n = int(missing.argmax()) if missing.any() else n
            if skip:
                skip -= n
            elif n:
                left -= n
                yield block[:n]
            if error is not None or not n:
                if error is not None and not (self.frames >= UNKNOWN and error.code == END):
                    reason = error.error_string.removeprefix("Error : ").strip(" .")
                    self.problem = f"what follows is damaged ({reason or 'no reason known'})"
                break
