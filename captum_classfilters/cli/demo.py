"""The main job on the network and images that ship with the package: tables, pictures, a saved file."""

import time
from collections.abc import Callable
from pathlib import Path


def run_demo(out: Path) -> None:
    """Find the class filters of the shipped network, judge them on images it never saw, draw them into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # slow to import, and of no use to --help
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd
    import torch
    from captum.attr import LayerAttribution
    from captum.attr import visualization as captum_visualization
    from captum.robust import FGSM

    from captum_classfilters import (
        ALDSplitter,
        HeadMoments,
        InfluentialFeatures,
        LabelSensitiveGate,
        PathDecoupler,
        PathDetector,
        ReportOptions,
        adversarial_paths,
        attacks,
        decompose,
        explain_confusion,
        metrics,
        report,
        visualize,
    )
    from captum_classfilters.assets import gate_file, load_demo_network, load_images, paths_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, about = load_demo_network()
    model = model.to(device)
    train, test = load_images("train"), load_images("test")
    print(f"ResNet-20 on Fashion-MNIST, {about['test_accuracy']:.2%} on 10,000 test images; 1,000 ship for this demo")

    selectors = ["histogram", "mean_activation", "contribution", "margin", "weight"]
    tables = InfluentialFeatures(model).attribute(train.batches(), selector=selectors, class_names=train.class_names)
    filters = tables["histogram"]
    print(f"\nOne pass over {int(filters.counts.sum())} training images: {filters}\n")
    print("Top 5 of 64 channels for each class, by votes")
    for name, channels in zip(filters.class_names, filters.top(5).tolist(), strict=True):
        print(f"  {name:<12}" + "".join(f"{channel:>4}" for channel in channels))
    print("\nWhat tells a shirt from a coat:", filters.contrast("shirt", "coat", k=5).tolist())

    curve = metrics.accuracy_curve(model, tables, test.batches(), [1, 2, 3, 5, 10])
    print("\nAccuracy on 1,000 test images with only k channels for each class (all 64: dense)")
    everything = curve[curve.class_name == "all"]
    print(everything.pivot(index="filters", columns="k", values="accuracy").round(3).to_string(na_rep=""))

    moments = HeadMoments.collect(model, train.batches())
    refitted = metrics.accuracy_curve(
        model, {"histogram": filters}, test.batches(), [1, 2, 3, 5, 10], refit="least_squares", moments=moments
    )
    pursued = metrics.accuracy_curve(model, None, test.batches(), [1, 2, 3, 5, 10], refit="omp", moments=moments)
    everything = pd.concat([refitted, pursued[pursued.filters == "omp"]])
    everything = everything[(everything.class_name == "all") & (everything.filters != "dense")]
    print("\nThe same with new weights for those channels, from one more pass, no SGD (omp: with channels of its own)")
    print(everything.pivot(index="filters", columns="k", values="accuracy").round(3).to_string())
    small = decompose(model, None, 5, refit="omp", moments=moments)
    kept, total = int((small.fc.weight != 0).sum()), small.fc.weight.numel()  # type: ignore[union-attr,operator]
    print(
        f"decompose(model, None, k=5, refit='omp', moments=...): the same network, {kept} of the head's {total} weights"
    )

    trees = ALDSplitter(model).split()
    print("\nFrom the last layer's weights alone: the most discriminative and the most confusing channels")
    for name, tree in zip(filters.class_names, trees.values(), strict=True):
        speaks, confuses = (tree.terminal(branch).tolist()[:5] for branch in ("positive", "negative"))
        print(f"  {name:<12}{speaks!s:<24}{confuses}")
    inputs, labels = next(iter(test.batches()))
    with torch.no_grad():
        wrong = (model(inputs.to(device)).argmax(1).cpu() != labels).nonzero().flatten()[:1]
    confusion = explain_confusion(model, inputs[wrong], labels[wrong])
    won, lost = (filters.class_names[int(label)] for label in (confusion.predicted, confusion.true))
    first = confusion.table[confusion.table.channel >= 0].head(5)
    print(
        f"\nWhy image {int(wrong)}, {lost}, is classified as {won}: logits {float(confusion.difference):.2f} apart, by "
        "channels " + ", ".join(f"{row.channel} ({row.contribution:+.2f})" for row in first.itertuples())
    )

    gated, _ = load_demo_network(0, "lsg")
    gate = LabelSensitiveGate.load(gate_file(0, "lsg")).class_filters(train.class_names)
    masked = metrics.class_masking(gated.to(device), gate, test.batches(), threshold=0.5)
    print("\nTrained with a gate: recall of each class as it is, without its own channels, without as many random ones")
    masked = masked[masked.masked == masked.class_name].set_index("class_name")
    own = masked[~masked.control].assign(random=masked[masked.control].recall)
    print(own[["channels", "intact", "recall", "random"]].round(2).to_string())

    routed, about = load_demo_network(0, "decoupled")
    decoupler = PathDecoupler(routed.to(device)).load(paths_file()).eval()
    paths = decoupler.paths(test.batches())
    share = float(paths.macs().double().mean()) / paths.costs.dense
    print(
        f"\nWith gates for each image, {about['test_accuracy']:.2%} on 10,000 test images, {share:.0%} of the "
        f"multiplications: {paths}"
    )
    print("Accuracy on the image's own path, and on others")
    print(metrics.path_accuracy(decoupler, test.batches())[["accuracy", "low", "high"]].round(3).to_string())

    fgsm = FGSM(decoupler, torch.nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
    attack = attacks.Attack(fgsm, epsilon=8 / 255)
    learn, judge = (adversarial_paths(decoupler, part.batches(), attack) for part in (train, test))
    half = len(paths) // 2
    detector = PathDetector(random_state=0).fit(*learn.stack()[:2]).calibrate(paths[:half], alpha=0.05)
    later = judge[judge.index >= half]
    alarms = [detector.alarms(part).mean() for part in (paths[half:], later.noise, later.adversarial)]
    print(
        f"\nAdversarial images (FGSM, 8/255): {judge}. A forest that has seen their paths on training images, told to "
        f"give false alarms for 5 % of clean ones: {alarms[0]:.0%} of clean images, {alarms[1]:.0%} of noisy ones, "
        f"{alarms[2]:.0%} of attacked ones. Who attacks the detector too is missed more often: see tutorial 05"
    )
    two = {name: paths[paths.labels == test.class_names.index(name)] for name in ("trouser", "ankle boot")}

    pictures: dict[str, Callable[[], object]] = {
        "class_filters": lambda: visualize.class_filters(filters, k=5),
        "accuracy_curve": lambda: visualize.accuracy_curve(curve),
        "gate": lambda: visualize.gate(gate),
        "paths": lambda: visualize.gate_strip(two),
        "overlap": lambda: visualize.overlap(filters, 5),
        "ald_tree": lambda: visualize.ald_tree(trees[filters.index("shirt")], class_names=filters.class_names),
        "filter_cards": lambda: visualize.filter_cards(model, filters, "ankle boot", test.batches()),
    }
    for name, draw in pictures.items():
        draw()
        plt.gcf().savefig(out / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close("all")
    boot = filters.index("ankle boot")
    image = test.images[test.labels == boot][:1].float() / 255
    seen = InfluentialFeatures(model).explain(image.to(device), boot, filters, k=5)
    seen = LayerAttribution.interpolate(seen, (28, 28), "bilinear")[0].cpu().permute(1, 2, 0).numpy()
    figure, _ = captum_visualization.visualize_image_attr(
        seen, image[0].expand(3, -1, -1).permute(1, 2, 0).numpy(), "blended_heat_map", "all", use_pyplot=False,
        title="What the 5 ankle boot channels look at",
    )  # fmt: skip
    figure.savefig(out / "explain.png", dpi=120, bbox_inches="tight")
    filters.save(out / "filters.safetensors")
    made = report(
        model,
        train.batches(),
        test.batches(),
        out / "report.html",
        class_names=train.class_names,
        options=ReportOptions(title="ResNet-20 on Fashion-MNIST", command=f"captum-classfilters demo --out {out}"),
    )
    print(f"\n{len(pictures) + 1} pictures and filters.safetensors are in {out.resolve()}")
    print(f"One page with all of it, for anybody to read ({made.size / 1e6:.1f} MB): open {out / 'report.html'}")
    print(f"took {time.perf_counter() - started:.0f} s on {device}")
