"""Fashion-MNIST dealt unevenly to any number of sites: the benchmark's image task.

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747, MIT): 28 × 28 grey images of ten kinds of
clothing. Proxy, validation and private images come from the 60,000 training images, the test set is Zalando's
own. The private ones are dealt by a Dirichlet distribution over labels (`data.alpha`), or evenly where
`data.partition = "iid"`.

The files are not in this project; Debian and Ubuntu package them.
"""

import gzip
import math
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.config import RunConfig
from common.datasets.pooled import deal_of, numbered
from common.datasets.scenario import PublicData, Scenario, SiteInfo, Sizes, chosen_sizes, public_data
from common.errors import ConfigError, UserError
from common.partition import random_parts
from common.preprocessing import PixelsSpec
from common.records import AnyArray, Index, Records
from common.seeds import generator

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the package `dataset-fashion-mnist` puts the files."""

NUM_TRAIN, NUM_TEST, NUM_SITES = 60_000, 10_000, 5

SIZES = Sizes(test=NUM_TEST, validation=500, proxy=3_000, proxy_labels=300, private=12_000)


def sites(config: RunConfig) -> tuple[SiteInfo, ...]:
    """Return site-1, site-2, …, each of which declares an even share."""
    num_sites = config.data.num_sites or NUM_SITES
    private = _sizes(config).private or 0
    if private < num_sites:
        raise ConfigError("run config", "data.num-sites", num_sites, f"at most {private}, the private images")
    return tuple(SiteInfo(name, round(private / num_sites)) for name in numbered(num_sites))


def load_public(config: RunConfig) -> PublicData:
    """Return proxy and validation from the training images, and the test images."""
    sizes, train, test = _sizes(config), _read(_folder(config), "train"), _read(_folder(config), "t10k")
    proxy, validation, _ = _cut(config)
    tested = np.arange(NUM_TEST)
    if sizes.test < NUM_TEST:
        tested = np.sort(generator(config.seed, "split", "test").permutation(NUM_TEST)[: sizes.test])
    return public_data(
        proxy=train.take(proxy),
        validation=train.take(validation),
        test=test.take(tested),
        specs=[PixelsSpec()],
        classes=CLASSES,
        num_labels=sizes.proxy_labels,
        seed=config.seed,
    )


def load_private(config: RunConfig, site: str) -> Records:
    """Return one site's images."""
    names = [info.name for info in sites(config)]
    if site not in names:
        raise UserError(f"there is no site {site!r}; the sites are {names[0]} to {names[-1]}")
    return _read(_folder(config), "train").take(_parts(config)[names.index(site)])


SCENARIO = Scenario(sites, load_public, load_private)


def _sizes(config: RunConfig) -> Sizes:
    if config.data.test_size > NUM_TEST:
        raise ConfigError("run config", "data.test-size", config.data.test_size, f"at most {NUM_TEST}")
    return chosen_sizes(config.data, SIZES, NUM_TRAIN + (config.data.test_size or NUM_TEST))


def _cut(config: RunConfig) -> list[Index]:
    sizes = _sizes(config)
    deal = random_parts([sizes.proxy, sizes.validation, sizes.private or 0], generator(config.seed, "split"))
    return deal(np.empty(NUM_TRAIN))[:3]


@lru_cache(maxsize=2)
def _parts(config: RunConfig) -> list[Index]:
    private = _cut(config)[2]
    labels = _read(_folder(config), "train").target[private]
    return [private[part] for part in deal_of(config, len(sites(config)))(labels)]


def _folder(config: RunConfig) -> Path:
    return Path(config.data.folder) if config.data.folder else FOLDER


@lru_cache(maxsize=2)
def _read(folder: Path, part: str) -> Records:
    """Read one part (`train` or `t10k`), once in a process: 47 MB and 8 MB."""
    count = {"train": NUM_TRAIN, "t10k": NUM_TEST}[part]
    pixels_NHW = _idx(folder / f"{part}-images-idx3-ubyte.gz", (count, 28, 28))
    labels_N = _idx(folder / f"{part}-labels-idx1-ubyte.gz", (count,))
    return Records(
        columns={"pixels": pixels_NHW[:, None]},
        target=np.asarray(CLASSES)[labels_N],
        patients=None,
        groups={},
    )


def _idx(path: Path, shape: tuple[int, ...]) -> AnyArray:
    """Read an idx file of bytes: 0, 0, 8, the rank; the dimensions, big-endian; the values."""
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing. Fashion-MNIST comes with `apt-get install dataset-fashion-mnist` "
            f"(in {FOLDER}); if the files lie elsewhere, set data.folder"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    if not data.startswith(header) or len(data) != len(header) + math.prod(shape):
        raise UserError(f"{path} isn't the idx file of Fashion-MNIST: expected bytes of shape {shape}")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
