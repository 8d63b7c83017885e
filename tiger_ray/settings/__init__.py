"""Every setting of the job: one file per section, checked before anything runs."""

from tiger_ray.settings.base import Section
from tiger_ray.settings.baseline import BaselineSettings
from tiger_ray.settings.catalog import CatalogSettings
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.embeddings import EmbeddingsSettings
from tiger_ray.settings.evaluation import EvaluationSettings
from tiger_ray.settings.events import EventsSettings
from tiger_ray.settings.export import ExportSettings
from tiger_ray.settings.loading import load_settings, setting_names
from tiger_ray.settings.model import ModelSettings
from tiger_ray.settings.quantizer import QuantizerSettings
from tiger_ray.settings.ray import RaySettings
from tiger_ray.settings.recommendations import RecommendationsSettings
from tiger_ray.settings.sasrec import SasrecSettings
from tiger_ray.settings.semantic_ids import SemanticIdsSettings
from tiger_ray.settings.sequences import SequencesSettings
from tiger_ray.settings.serving import ServingSettings
from tiger_ray.settings.settings import Settings
from tiger_ray.settings.storage import StorageSettings
from tiger_ray.settings.training import TrainingSettings

__all__ = [
    "BaselineSettings",
    "CatalogSettings",
    "DecodingSettings",
    "EmbeddingsSettings",
    "EvaluationSettings",
    "EventsSettings",
    "ExportSettings",
    "ModelSettings",
    "QuantizerSettings",
    "RaySettings",
    "RecommendationsSettings",
    "SasrecSettings",
    "Section",
    "SemanticIdsSettings",
    "SequencesSettings",
    "ServingSettings",
    "Settings",
    "StorageSettings",
    "TrainingSettings",
    "load_settings",
    "setting_names",
]
