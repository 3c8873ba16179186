"""Tables from elsewhere as logs: CSV, TSV, parquet and JSON lines become RecBole's atomic files."""

from recbole_cl.importer.formats import Format, Side, list_formats, read_format
from recbole_cl.importer.health import health
from recbole_cl.importer.read import Columns, read_log
from recbole_cl.importer.write import import_log

__all__ = [
    "Columns",
    "Format",
    "Side",
    "health",
    "import_log",
    "list_formats",
    "read_format",
    "read_log",
]
