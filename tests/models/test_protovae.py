"""ProtoVAE: episodes, the embedding, the gradient's way, and the number of decodes."""

from __future__ import annotations

import pytest
import torch

from fastdis.models import ProtoVAE


def small(**options) -> ProtoVAE:
    torch.manual_seed(0)
    return ProtoVAE(**{"latent_dim": 4, "image_size": 32, "shots": 2, "queries": 3, "embedding_dim": 8, **options})


@pytest.mark.parametrize("intervention", ["prior", "swap"])
def test_exactly_one_coordinate_changes_and_the_label_names_it(intervention):
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(17))
    episode = small(intervention=intervention).episode(z, torch.Generator().manual_seed(0))
    assert episode.intervened.shape == (5, 4, 4)
    assert torch.equal(episode.bases, z)
    changed = episode.intervened != z.unsqueeze(1)
    assert (changed.sum(-1) == 1).all()
    assert torch.equal(changed.to(torch.int64).argmax(-1), episode.labels)
    assert episode.labels.dtype == torch.int64
    assert episode.labels.tolist() == [[0, 1, 2, 3]] * 5


def test_swapped_values_come_from_the_same_coordinate_of_another_image():
    z = torch.arange(20.0).reshape(5, 4)
    values = small(intervention="swap").episode(z, torch.Generator().manual_seed(1)).intervened.diagonal(dim1=1, dim2=2)
    assert torch.equal(values % 4, z % 4)
    assert (values != z).all()
    # Every other image is drawn from, not one alone.
    model = small(intervention="swap")
    many = [model.episode(z, torch.Generator().manual_seed(seed)).intervened for seed in range(20)]
    offsets = (torch.stack(many).diagonal(dim1=2, dim2=3) - z) / 4 % 5
    assert set(offsets.flatten().tolist()) == {1, 2, 3, 4}


def test_prior_values_are_standard_normal():
    episode = small(latent_dim=2).episode(torch.full((20_000, 2), 9.0), torch.Generator().manual_seed(0))
    values = episode.intervened.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(values.mean(0), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(2), atol=0.03, rtol=0)


def test_episode_repeats_with_its_generator():
    model, z = small(), torch.randn(5, 4)
    first = model.episode(z, torch.Generator().manual_seed(3)).intervened
    assert torch.equal(first, model.episode(z, torch.Generator().manual_seed(3)).intervened)
    assert not torch.equal(first, model.episode(z, torch.Generator().manual_seed(4)).intervened)


def test_episode_of_one_vector():
    z = torch.randn(1, 4)
    assert small().episode(z).intervened.shape == (1, 4, 4)
    with pytest.raises(ValueError, match="at least 2 vectors"):
        small(intervention="swap").episode(z)


def test_episode_of_another_width():
    with pytest.raises(ValueError, match=r"\[P, 4\], got \[5, 3\]"):
        small().episode(torch.zeros(5, 3))


def test_embedding_sees_before_and_after():
    model = small()
    before, after = torch.rand(2, 1, 32, 32), torch.rand(2, 3, 1, 32, 32)
    embedded = model.embed(before, after)
    assert embedded.shape == (2, 3, 8)
    pair = torch.cat([before[1], after[1, 2]]).unsqueeze(0)
    torch.testing.assert_close(embedded[1, 2], model.embedder(pair)[0])


def test_difference_of_no_change_is_zero():
    model = small(embedding="difference", channels=3)
    before = torch.rand(2, 3, 32, 32)
    after = torch.stack([before, torch.rand_like(before)], dim=1)
    embedded = model.embed(before, after)
    torch.testing.assert_close(embedded[:, 0], torch.zeros(2, 8), atol=1e-6, rtol=0)
    assert (embedded[:, 1].norm(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("embedding", ["concat", "difference"])
@pytest.mark.parametrize("isometry_weight", [0.0, 2.0])
def test_terms_add_up(embedding, isometry_weight):
    model = small(beta=3.0, proto_weight=0.5, embedding=embedding, isometry_weight=isometry_weight)
    terms = model.loss(torch.rand(6, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    assert set(terms) == {"loss", "reconstruction", "kl", "prototypical", "accuracy"} | (
        {"isometry"} if isometry_weight else set()
    )
    total = terms["reconstruction"] + 3.0 * terms["kl"] + 0.5 * terms["prototypical"]
    total = total + isometry_weight * terms.get("isometry", torch.zeros(()))
    torch.testing.assert_close(terms["loss"], total)
    assert 0 <= terms["accuracy"] <= 1
    assert not terms["accuracy"].requires_grad
    assert terms["prototypical"] > 0


@pytest.mark.parametrize("image_size", [32, 64])
def test_fresh_embedder_does_not_fade_its_input_out(image_size):
    model = small(image_size=image_size, embedding_dim=64)
    embedded = model.embed(torch.randn(64, 1, image_size, image_size), torch.randn(64, 2, 1, image_size, image_size))
    assert 0.3 < embedded.std(dim=0).mean() < 3


def test_prototypical_loss_by_hand():
    """Nearest prototype, in the words of Snell et al. (2017), from embeddings that say the coordinate outright."""
    model = small(proto_weight=1.0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 4, 8, generator=generator)
    embeddings = torch.eye(4, 8).expand(5, 4, 8) * 3 + 0.5 * noise
    model.embed = lambda before, after: embeddings
    terms = model.loss(torch.rand(5, 1, 32, 32))
    prototypes = embeddings[:2].mean(0)
    expected, hits = 0.0, 0
    for image in range(2, 5):
        for n in range(4):
            distances = (embeddings[image, n] - prototypes).square().sum(-1)
            expected -= torch.log_softmax(-distances, 0)[n] / 12
            hits += int(distances.argmin() == n)
    torch.testing.assert_close(terms["prototypical"], expected)
    assert terms["accuracy"] == pytest.approx(hits / 12)
    assert hits / 12 > 0.5


@pytest.mark.parametrize("term", ["prototypical", "isometry"])
@pytest.mark.parametrize("embedding", ["concat", "difference"])
def test_gradient_reaches_decoder_and_embedder(term, embedding):
    model = small(isometry_weight=1.0, embedding=embedding)
    model.loss(torch.rand(6, 1, 32, 32))[term].backward()
    for part in (model.decoder, model.embedder):
        for name, parameter in part.named_parameters():
            # The last bias of the embedder cancels in differences between embeddings.
            if parameter.grad is None or not parameter.grad.any():
                assert part is model.embedder
                assert name == "11.bias"


def test_isometry_term_is_zero_for_an_isometric_embedding():
    model = small(isometry_weight=1.0, embedding="difference")
    z = torch.randn(5, 4)
    episode = model.episode(z, torch.Generator().manual_seed(0))
    exact = episode.intervened - z.unsqueeze(1)
    assert model._isometry(episode, torch.zeros(5, 1, 32, 32), exact) < 1e-10
    twice = model._isometry(episode, torch.zeros(5, 1, 32, 32), 2 * exact)
    torch.testing.assert_close(twice, exact.abs().sum(-1).square().mean())


def test_base_decodes_are_shared():
    model = small()
    decoded: list[int] = []
    decode = model.decode
    model.decode = lambda z: (decoded.append(len(z)), decode(z))[1]
    model.loss(torch.rand(6, 1, 32, 32))
    # The batch once, its first five among them, and the four interventions on each of those.
    assert decoded == [6, 5 * 4]


@pytest.mark.parametrize(("part", "steps"), [("decoder", 40), ("embedder", 120)])
def test_either_part_alone_learns_to_tell_interventions_apart(part, steps):
    """On one episode, by the prototypical loss; chance is one in four, and its loss ln 4."""
    model = small()
    optimizer = torch.optim.Adam(getattr(model, part).parameters(), lr=3e-3)
    x = (torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for _ in range(steps):
        terms = model.loss(x, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        terms["prototypical"].backward()
        optimizer.step()
    assert terms["prototypical"] < 1.1
    assert terms["accuracy"] >= 0.5


def test_batch_smaller_than_an_episode():
    with pytest.raises(ValueError, match=r"shots \+ queries = 5 images, got 4"):
        small().loss(torch.rand(4, 1, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"queries": -1}, "queries"),
        ({"embedding_dim": 0}, "embedding_dim"),
        ({"proto_weight": -1.0}, "proto_weight must not be negative"),
        ({"isometry_weight": float("nan")}, "isometry_weight"),
        ({"embedding": "sum"}, "one of concat, difference, got 'sum'"),
        ({"intervention": "noise"}, "one of prior, swap, got 'noise'"),
    ],
)
def test_parameters_outside_their_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
