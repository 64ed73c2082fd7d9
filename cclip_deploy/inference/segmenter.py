"""Segment images by text prompts: one image pass serves any number of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import cast, overload

from cclip_deploy.bundle.bundle import CHAIN, Bundle
from cclip_deploy.common.limits import MOST_PICTURE_BYTES
from cclip_deploy.common.threads import check_threads
from cclip_deploy.errors import UsageError
from cclip_deploy.imaging.image import Picture
from cclip_deploy.imaging.segmentation import Segmentation, check_spacing, check_threshold
from cclip_deploy.imaging.sources import ImageSource, read_source
from cclip_deploy.inference.describe_prompt import prompt_warnings
from cclip_deploy.inference.graph_chain import Features, Floats, GraphChain
from cclip_deploy.inference.prompt_cache import KernelFolder, PromptCache
from cclip_deploy.inference.spec import SegmenterSpec, bundle_spec, kernel_origin
from cclip_deploy.prompts.spelling import RepairedPrompt, repair_prompts
from cclip_deploy.runtime.backend import Backend
from cclip_deploy.runtime.registry import BackendConfig, BackendName, OpenBackend, opened

IMAGES_AT_ONCE = 8
"""Largest number of images in one run of the image encoder and mask decoder."""


class Segmenter(GraphChain):
    """Segments images by text prompts. The kernel of a prompt is computed once and cached.

        with Segmenter.load("lungs.cclip") as segmenter:
            result = segmenter.segment("film.dcm", "lower left lung")
            print(result.area_px, result.mask.shape)

    Graphs are loaded when they are first needed, or by `warm_up`. All methods but `close` may be called from several
    threads at once.

    Attributes:
        spec: how the network's inputs are prepared and its outputs are read.
        opened: the backend with what was requested, what runs, and the reason if they differ.
    """

    def __init__(self, backend: Backend, spec: SegmenterSpec, cache: PromptCache | None = None) -> None:
        """Use a backend's graphs, which are loaded on first use; without `cache`, kernels are cached in memory."""
        super().__init__(backend, spec, cache)
        self.opened = OpenBackend(backend, backend.name, backend.name)
        self._resources = ExitStack()

    @staticmethod
    def load(
        bundle: str | Path | Bundle,
        backend: BackendName | BackendConfig = "onnxruntime",
        precision: str = "fp32",
        threads: int | None = None,
        prompt_cache: str | Path | None = None,
    ) -> Segmenter:
        """Open a bundle on a backend. Use the segmenter in `with`, or close it.

        Args:
            bundle: folder of the bundle, or the open bundle.
            backend: "onnxruntime" or "openvino" to run graphs on a CPU, "tensorrt" or "tensorrt-rtx" to run engines, or
                a configuration with device, GPU settings and fallback.
            precision: of the graphs or engines, such as "fp16".
            threads: CPU threads of one run; None is the backend's default.
            prompt_cache: folder that keeps the kernels of prompts between processes.

        Raises:
            BundleError: the bundle is missing, damaged, or has another schema version.
            UsageError: there is no such backend, or the bundle lacks graphs or engines of the precision.
            EnvironmentIssue: the backend is not installed or cannot use its device.
        """
        found = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        config = backend if isinstance(backend, BackendConfig) else BackendConfig(backend)
        config = config if threads is None else replace(config, threads=threads)
        check_threads(config.threads)
        with ExitStack() as resources:
            runs = resources.enter_context(opened(config, found, precision))
            for graph in CHAIN:
                resources.callback(runs.backend.unload, graph)
            segmenter = Segmenter.of_bundle(found, runs.backend, None if prompt_cache is None else Path(prompt_cache))
            segmenter.opened, segmenter._resources = runs, resources.pop_all()
        return segmenter

    @staticmethod
    def of_bundle(bundle: Bundle, backend: Backend, prompt_cache: Path | None = None) -> Segmenter:
        """Return a segmenter for a bundle on an open backend, which `close` leaves open.

        Prompt kernels are also stored in the folder `prompt_cache`, if given.

        Raises:
            UsageError: see `bundle_spec`; or `prompt_cache` is a file.
            BundleError: see `bundle_spec`.
            EnvironmentIssue: `prompt_cache` cannot be written.
        """
        spec = bundle_spec(bundle, backend)
        folder = None if prompt_cache is None else KernelFolder(prompt_cache, kernel_origin(bundle, backend.precision))
        return Segmenter(backend, spec, PromptCache(folder))

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Segmenter {self.spec.name!r}, {self.opened.ran}, {self._backend.precision}>"

    def close(self) -> None:
        """Free the graphs and what `load` opened; the segmenter cannot be used afterwards."""
        self._is_closed = True
        self._resources.close()

    # The overloads overlap because a path is a sequence of strings, too; the first one that fits is meant.
    @overload
    def segment(  # type: ignore[overload-overlap]
        self, image: ImageSource, prompts: str, *, threshold: float | None = ..., repair: bool = ...,
        spacing_mm: tuple[float, float] | None = ...,
    ) -> Segmentation: ...  # fmt: skip
    @overload
    def segment(  # type: ignore[overload-overlap]
        self, image: ImageSource, prompts: Sequence[str], *, threshold: float | None = ..., repair: bool = ...,
        spacing_mm: tuple[float, float] | None = ...,
    ) -> list[Segmentation]: ...  # fmt: skip
    @overload
    def segment(  # type: ignore[overload-overlap]
        self, image: Sequence[ImageSource], prompts: str, *, threshold: float | None = ..., repair: bool = ...,
        spacing_mm: tuple[float, float] | None = ...,
    ) -> list[Segmentation]: ...  # fmt: skip
    @overload
    def segment(
        self, image: Sequence[ImageSource], prompts: Sequence[str], *, threshold: float | None = ...,
        repair: bool = ..., spacing_mm: tuple[float, float] | None = ...,
    ) -> list[list[Segmentation]]: ...  # fmt: skip
    def segment(
        self,
        image: ImageSource | Sequence[ImageSource],
        prompts: str | Sequence[str],
        *,
        threshold: float | None = None,
        repair: bool = True,
        spacing_mm: tuple[float, float] | None = None,
    ) -> Segmentation | list[Segmentation] | list[list[Segmentation]]:
        """Segment one image, or a list of images, by one prompt or several.

        Every image passes through the image encoder once, up to `IMAGES_AT_ONCE` of a list together. All results of the
        call are in memory at the end: 5 bytes per pixel and prompt.

        Args:
            image: see `read_source` for what an image can be; or a list or tuple of images.
            prompts: a string is one prompt; or a list of prompts.
            threshold: probability from which a pixel is part of the mask; None is the bundle's threshold.
            repair: whether typing errors in prompts are corrected, as in training, evaluation and `predict`.
            spacing_mm: distances in mm between the centers of rows and of columns, for images whose files do not say.

        Returns:
            One result for one image and a string. A list, in order, for several prompts, or for several images. A list
            of results for each image, for several prompts on several images.

        Raises:
            UsageError: there is no image or prompt, or an argument is out of range or of another type.
            PromptError: a prompt is empty or too long. Both are raised before an image is read.
            ImageError: an image cannot be decoded or used; the message says which. No result is returned then.
            ParityError: the network gave values that are not finite.
        """
        is_batch = isinstance(image, list | tuple)
        images = cast("Sequence[ImageSource]", image if is_batch else [image])
        if not images:
            raise UsageError("There is no image. Give at least one.")
        asked = repair_prompts(prompts, repair)
        rows = self._token_rows([prompt.text for prompt in asked])
        limit = self._threshold(threshold)
        if spacing_mm is not None:
            check_spacing(spacing_mm)
        results: list[list[Segmentation]] = []
        for pictures in _groups(images, spacing_mm):
            found: list[list[Segmentation]] = [[] for _ in pictures]
            maps_of_prompts = self.answers([picture.pixels for picture in pictures], rows)
            for prompt, maps in zip(asked, maps_of_prompts, strict=True):
                for of_image, picture, probability in zip(found, pictures, maps, strict=True):
                    of_image.append(_result(picture, prompt, probability, limit))
            results += found
        if isinstance(prompts, str):
            firsts = [of_image[0] for of_image in results]
            return firsts if is_batch else firsts[0]
        return results if is_batch else results[0]

    def segment_each(
        self,
        picture: Picture,
        prompts: Sequence[RepairedPrompt],
        threshold: float | None = None,
        features: Features | None = None,
    ) -> Iterator[Segmentation]:
        """Yield the results of `segment` for one image one by one, so that memory does not grow with the prompts.

        Args:
            picture: the image.
            prompts: as `repair_prompts` returns them.
            threshold: see `segment`.
            features: of the image, if they were computed before.
        """
        limit = self._threshold(threshold)
        probabilities = self.probabilities(picture.pixels, [prompt.text for prompt in prompts], features)
        for prompt, probability in zip(prompts, probabilities, strict=True):
            yield _result(picture, prompt, probability, limit)

    def _threshold(self, threshold: float | None) -> float:
        if threshold is None:
            return self.spec.threshold
        check_threshold(threshold)
        return threshold


def _groups(images: Sequence[ImageSource], spacing_mm: tuple[float, float] | None) -> Iterator[list[Picture]]:
    """Read images and yield them in groups of at most `IMAGES_AT_ONCE` images and, if more than one, limited bytes."""
    group: list[Picture] = []
    for number, image in enumerate(images, start=1):
        picture = read_source(image, "The image" if len(images) == 1 else f"Image {number}")
        picture = picture if spacing_mm is None else replace(picture, spacing_mm=spacing_mm)
        size = picture.pixels.nbytes + sum(other.pixels.nbytes for other in group)
        if len(group) == IMAGES_AT_ONCE or (group and size > MOST_PICTURE_BYTES):
            yield group
            group = []
        group.append(picture)
    yield group


def _result(picture: Picture, prompt: RepairedPrompt, probability: Floats, threshold: float) -> Segmentation:
    warnings = (*prompt_warnings(prompt), *picture.warnings)
    return Segmentation(prompt.text, probability, threshold, picture.spacing_mm, warnings)
