# Writes 40 C sources with some work for the compiler in each.
BEGIN {
	for (f = 0; f < 40; f++) {
		name = sprintf("%s/part%02d.c", folder, f)
		for (g = 0; g < 60; g++) {
			printf "double part%02d_%02d(double x, int n)\n{\n\tdouble sum = %d.5;\n", f, g, g > name
			printf "\tfor (int i = 1; i < n; i++)\n\t\tsum += (x + i * %d) / (i + sum * sum) - sum / (x * x + %d);\n", g + 1, f + 1 > name
			printf "\treturn sum > x ? sum - x : sum + %d;\n}\n\n", f > name
		}
		close(name)
	}
}
