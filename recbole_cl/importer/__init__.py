"""Tables from elsewhere as logs: CSV, TSV, parquet and JSON lines become RecBole's atomic files."""

from recbole_cl.importer.health import health
from recbole_cl.importer.read import Columns, read_log
from recbole_cl.importer.write import import_log

__all__ = ["Columns", "health", "import_log", "read_log"]
